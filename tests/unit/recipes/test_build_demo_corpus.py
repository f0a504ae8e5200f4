"""The recipe of the demo corpus gives the corpus that is in the package."""

from recipes.build_demo_corpus import main
from selectmoe.paths import DEMO_CORPUS


def test_the_recipe_reproduces_the_embedded_corpus(tmp_path):
    main(["--output", str(tmp_path / "corpus.jsonl")])
    assert (tmp_path / "corpus.jsonl").read_bytes() == DEMO_CORPUS.read_bytes()
