import json
import tomllib

import pytest

from selectmoe import __version__
from selectmoe.cli.info_command import EXTRAS, main
from selectmoe.errors import ModelError
from selectmoe.paths import EMBEDDED_SELECTOR


def test_the_installation_is_described(capsys):
    main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["selectmoe"] == __version__
    assert facts["torch"].startswith("2.")


def test_a_selector_is_described(capsys):
    main(["--model", str(EMBEDDED_SELECTOR)])
    printed = capsys.readouterr().out
    assert "num_hidden_layers" in printed
    assert "8,000 samples, formula answer_margin" in printed


def test_what_is_no_selector_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        main(["--model", str(tmp_path)])


def test_every_extra_is_looked_for(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"all", "dev"}
