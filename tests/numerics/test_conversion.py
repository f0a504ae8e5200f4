"""A converted OLMoE computes what it computed, whatever layout it came in, and nothing is lost."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from selectmoe.errors import ConfigError, ModelError, ParityError
from selectmoe.model.conversion import convert_olmoe
from selectmoe.model.parity import require_parity, verify_conversion
from selectmoe.model.tokenizer_loading import quiet_transformers
from selectmoe.model.weight_files import hub_tensors, stored_tensors
from selectmoe.records import Message, Sample
from selectmoe.scoring.engine import ScoringEngine
from tests.tiny_olmoe import CHAT_TEMPLATE, SMALL, save_tiny_olmoe

IDS = torch.arange(4, 68).reshape(2, 32)
TOLERANCE = 1e-5  # float32; same operations in the same order, so any real difference is above it
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
GATES = {
    f"model.layers.{layer}.mlp.quality_gate.{part}": shape
    for layer in range(2)
    for part, shape in (("weight", (2, 32)), ("bias", (2,)))
}
TRASH_VECTORS = {f"model.layers.{layer}.mlp.trash_expert.vector" for layer in range(2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_olmoe(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    return convert_olmoe(base, tmp_path_factory.mktemp("converted") / "new").folder


def logits(model_class, folder, **settings):
    with quiet_transformers(), torch.inference_mode():
        return model_class.from_pretrained(folder, **settings)(IDS).logits.float()


def forced_open_difference(base, folder):
    opened = logits(AutoModelForCausalLM, folder, quality_gate_forced_open=True)
    return (opened - logits(OlmoeForCausalLM, base)).abs().max().item()


def gates_of(folder):
    return {name: tensor for name, tensor in weights(folder).items() if "quality_gate" in name}


def weights(folder):
    return load_file(folder / "model.safetensors")


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def copied(folder, target, **changed_weights):
    """A copy of a folder, with tensors replaced or, where None is given, left out."""
    shutil.copytree(folder, target)
    changed = {**weights(folder), **changed_weights}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "fused", "sharded"])
def test_forced_open_it_is_the_base_from_every_layout(layout, tied, tmp_path):
    base = save_tiny_olmoe(tmp_path / "base", layout=layout, tie_word_embeddings=tied)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (layout == "sharded")
    converted = convert_olmoe(base, tmp_path / "new").folder
    assert forced_open_difference(base, converted) <= TOLERANCE
    assert logits(OlmoeForCausalLM, base).abs().max() > 0.1  # else anything would be close


@pytest.mark.parametrize("layout", ["hub", "fused", "sharded"])
def test_every_tensor_is_taken_over_bit_by_bit_and_only_gates_are_added(layout, tmp_path):
    base = save_tiny_olmoe(tmp_path / "base", layout=layout)
    conversion = convert_olmoe(base, tmp_path / "new")
    written = stored_tensors(conversion.folder)
    expected = shapes(
        hub_tensors(
            {name: torch.empty(stored.shape) for name, stored in stored_tensors(base).items()}
        )
    )
    assert shapes(written) == expected | GATES
    report = verify_conversion(base, conversion.folder)
    assert (report.num_tensors, report.different_tensors) == (len(expected), ())
    assert conversion.num_parameters == sum(torch.Size(s).numel() for s in expected.values())
    assert conversion.num_added_parameters == 2 * (2 * 32 + 2)


def test_bfloat16_stays_bfloat16(tmp_path):
    base = save_tiny_olmoe(tmp_path / "base", dtype=torch.bfloat16)
    conversion = convert_olmoe(base, tmp_path / "new")
    assert conversion.dtype == "bfloat16"
    assert {stored.dtype for stored in stored_tensors(conversion.folder).values()} == {"BF16"}
    assert json.loads((conversion.folder / "config.json").read_text())["dtype"] == "bfloat16"
    report = verify_conversion(base, conversion.folder)
    require_parity(report)
    # The same operations on the same numbers: equal, not only close.
    assert report.by_dtype["bfloat16"].forced_open_max_difference == 0


def test_a_base_of_two_dtypes_is_stored_in_the_one_that_holds_both(tmp_path):
    half = save_tiny_olmoe(tmp_path / "half", dtype=torch.bfloat16)
    norm = torch.full((32,), 1 + 2**-20)  # bfloat16 would round it to 1
    base = copied(half, tmp_path / "base", **{"model.norm.weight": norm})
    conversion = convert_olmoe(base, tmp_path / "new")
    assert conversion.dtype == "float32"
    require_parity(verify_conversion(base, conversion.folder))


def test_a_tied_head_that_is_stored_too_is_taken_over(tmp_path):
    tied = save_tiny_olmoe(tmp_path / "tied", tie_word_embeddings=True)
    embedding = weights(tied)["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding + 1):
        base = copied(tied, tmp_path / f"base{head.sum()}", **{"lm_head.weight": head})
        converted = convert_olmoe(base, tmp_path / f"new{head.sum()}").folder
        assert forced_open_difference(base, converted) <= TOLERANCE
        require_parity(verify_conversion(base, converted))


def test_settings_that_change_the_result_travel_also_from_an_old_config(tmp_path):
    settings = {"norm_topk_prob": True, "clip_qkv": 0.5, "attention_bias": True}
    base = save_tiny_olmoe(tmp_path / "base", rms_norm_eps=1e-2, **settings)
    old = json.loads((base / "config.json").read_text())
    # As the hub's own files have it, written years before this transformers.
    del old["rope_parameters"], old["dtype"]
    old |= {"rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(old))
    converted = convert_olmoe(base, tmp_path / "new").folder
    assert forced_open_difference(base, converted) <= TOLERANCE
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "select_moe"
    assert config["rope_parameters"]["rope_theta"] == 100.0
    assert {key: config[key] for key in settings} == settings


def test_the_new_folder_serves_whoever_reads_models(base, converted):
    stock = logits(OlmoeForCausalLM, converted)  # leaves the gates aside
    assert (stock - logits(OlmoeForCausalLM, base)).abs().max() <= TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("open").input_ids == AutoTokenizer.from_pretrained(base)("open").input_ids
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 1)
    engine = ScoringEngine.from_pretrained(converted, device="cpu")
    sample = Sample("d", "1", (Message("user", "Open?"), Message("assistant", "It is open.")))
    [scored] = engine.score([sample])
    assert 0.5 < scored.score < 1
    modes = {file.stat().st_mode for file in converted.iterdir()}
    assert len(modes) == 1  # who may read the configuration may read the weights


def test_gates_start_nearly_open_from_the_seed_alone(base, converted, tmp_path):
    fused = save_tiny_olmoe(tmp_path / "fused", layout="fused")
    same = gates_of(convert_olmoe(fused, tmp_path / "same", seed=0).folder)
    other = gates_of(convert_olmoe(base, tmp_path / "other", seed=1).folder)
    gates = gates_of(converted)
    for name, tensor in gates.items():
        assert torch.equal(tensor, same[name])
        if name.endswith("bias"):
            assert (tensor[0] - tensor[1]).sigmoid() > 0.95
        else:
            assert not torch.equal(tensor, other[name])
            assert 0 < tensor.std() < 0.1


def test_converting_leaves_the_callers_random_numbers_alone(base, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    convert_olmoe(base, tmp_path / "new", seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_gates_as_initialised_drift_but_stay_close(base, converted, tmp_path):
    shut = convert_olmoe(base, tmp_path / "shut", quality_gate_init_bias=-4).folder
    for dtype, parity in verify_conversion(base, converted).by_dtype.items():
        assert parity.drift_max_difference > 10 * parity.forced_open_max_difference
        assert 0 < parity.drift_mean_difference < parity.drift_max_difference
        # 2 % of the experts' part is gone in either of 2 layers; shut, nearly all of it is.
        assert 0 < parity.drift_kl_nats_per_token < 0.01
        assert parity.perplexity == pytest.approx(parity.base_perplexity, rel=0.05)
        closed = verify_conversion(base, shut).by_dtype[dtype]
        assert closed.drift_kl_nats_per_token > 10 * parity.drift_kl_nats_per_token


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"trash_expert_mode": "noise"}, set()),
        ({"trash_expert_mode": "custom"}, TRASH_VECTORS),
        ({"quality_gate_forced_open": True}, set()),
        ({"quality_gate_init_mean": 1, "quality_gate_init_std": 0}, set()),
    ],
)
def test_settings_of_gates_are_kept_and_parity_holds_with_them(base, settings, added, tmp_path):
    folder = convert_olmoe(base, tmp_path / "new", **settings).folder
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in settings} == settings
    assert set(weights(folder)) - set(weights(base)) == set(GATES) | added
    assert forced_open_difference(base, folder) <= TOLERANCE
    report = verify_conversion(base, folder)
    require_parity(report)
    assert report.by_dtype["float32"].drift_max_difference > 0  # also where forced open is stored


def test_a_changed_expert_is_found_even_where_no_token_shows_it(base, converted, tmp_path):
    expert = weights(converted)[EXPERT].clone()
    expert[0, 0] = torch.nextafter(expert[0, 0], torch.tensor(9.0))  # the logits hide such a step
    report = verify_conversion(base, copied(converted, tmp_path / "new", **{EXPERT: expert}))
    assert report.different_tensors == (EXPERT,)
    assert not report.passed
    with pytest.raises(ParityError, match=r"1 of 45 tensors differ.*experts\.3\.up_proj"):
        require_parity(report)


def test_a_changed_setting_is_found_by_the_logits(base, converted, tmp_path):
    folder = edit_config(copied(converted, tmp_path / "new"), num_experts_per_tok=1)
    report = verify_conversion(base, folder)
    assert report.different_tensors == ()
    with pytest.raises(ParityError, match=r"float32 logits differ by .*bfloat16 logits differ"):
        require_parity(report)


def test_gates_may_be_trained_without_breaking_parity(base, converted, tmp_path):
    name = "model.layers.0.mlp.quality_gate.bias"
    folder = copied(converted, tmp_path / "new", **{name: torch.tensor([-9.0, 9.0])})
    require_parity(verify_conversion(base, folder))


def test_numbers_that_are_not_finite_never_count_as_equal(base, converted, tmp_path):
    broken = copied(
        converted, tmp_path / "new", **{"model.norm.weight": torch.full((32,), torch.nan)}
    )
    report = verify_conversion(base, broken)
    with pytest.raises(ParityError, match="float32 logits differ by nan"):
        require_parity(report)
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["by_dtype"]["float32"]["forced_open_max_difference"] is None
    assert stored["passed"] is False
    both = copied(base, tmp_path / "base", **{"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(ParityError, match="not finite in float32"):
        verify_conversion(both, broken)


def test_another_base_is_refused(converted, tmp_path):
    wide = save_tiny_olmoe(tmp_path / "wide", intermediate_size=24)
    with pytest.raises(ParityError, match="other names or shapes"):
        verify_conversion(wide, converted)


def test_the_report_holds_what_was_compared(base, converted):
    report = verify_conversion(base, converted)
    stored = report.to_json()
    assert stored["passed"] is True
    assert stored["num_tokens"] == SMALL["max_position_embeddings"]  # the text is longer
    assert (stored["base"], stored["converted"]) == (str(base), str(converted))
    assert stored["torch_version"] == torch.__version__
    assert set(stored["by_dtype"]) == {"float32", "bfloat16"}
    other_text = dataclasses.replace(report, same_token_ids=False)
    with pytest.raises(ParityError, match="read the same text differently"):
        require_parity(other_text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EXPERT: None}, f"lacks '{EXPERT}'"),
        (
            {f"model.layers.0.mlp.experts.{n}.down_proj.weight": None for n in range(4)},
            r"lacks 'model.layers.0.*2.down_proj.weight' and 1 more",
        ),
        ({"lm_head.weight": None}, r"lacks 'lm_head\.weight'"),
        ({"model.extra.weight": torch.zeros(1)}, r"has 'model\.extra\.weight', which no such"),
        (
            {EXPERT.replace("3", "4", 1): torch.zeros(16, 32)},
            r"has 'model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight', which no such model has",
        ),
        ({EXPERT: torch.zeros(16, 31)}, r"must have the shape \[16, 32\].*got \[16, 31\]"),
        ({EXPERT: torch.zeros(16, 32, dtype=torch.int8)}, "dtype must be one of .*got I8"),
    ],
)
def test_a_base_with_missing_or_other_tensors_is_refused_by_name(base, change, message, tmp_path):
    wrong = copied(base, tmp_path / "wrong", **change)
    refuse(wrong, tmp_path / "new", message)


def refuse(base, target, message, error=ModelError):
    """`convert_olmoe` ends with one line and leaves nothing behind."""
    with pytest.raises(error, match=message) as refused:
        convert_olmoe(base, target)
    assert "\n" not in str(refused.value)
    assert not target.exists()
    assert list(target.parent.glob(".*.partial")) == []


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_shard(folder):
    shutil.rmtree(folder)
    save_tiny_olmoe(folder, layout="sharded")
    (folder / "model-00003-of-00007.safetensors").unlink()


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"model\.safetensors: not a readable weights file"),
        (drop_shard, "names model-00003-of-00007.safetensors, which is missing"),
        (pickle_only, r"has neither model\.safetensors .* load it with transformers and save"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit_config(f, model_type="llama"), "model_type is 'llama'"),
        (lambda f: edit_config(f, model_type="select_moe"), "is a Select-MoE already"),
        (lambda f: edit_config(f, hidden_size="wide"), r"cannot be used: .*'hidden_size'"),
        (lambda f: edit_config(f, hidden_act="nope"), "no model that can be built"),
        (lambda f: edit_config(f, vocab_size=300), "vocab_size of 300|must have the shape"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read"),
    ],
)
def test_a_spoiled_base_is_refused_in_one_line(base, spoil, message, tmp_path):
    wrong = shutil.copytree(base, tmp_path / "wrong")
    spoil(wrong)
    refuse(wrong, tmp_path / "new", message)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    base = save_tiny_olmoe(tmp_path / "base", vocab_size=200)
    refuse(base, tmp_path / "new", "token ids up to .* vocab_size of 200")


def test_a_missing_base_is_refused(tmp_path):
    refuse(tmp_path / "nowhere", tmp_path / "new", "nowhere does not exist")


def test_a_save_path_that_holds_something_or_lies_in_the_base_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"new or empty folder.*not empty"):
        convert_olmoe(base, base)
    refuse(base, base / "new", "must lie outside base", ConfigError)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="which is a file"):
        convert_olmoe(base, tmp_path / "file")
    refuse(base, tmp_path / "file" / "new", "cannot be written", ConfigError)
    (tmp_path / "link").symlink_to(base / "new")
    refuse(base, tmp_path / "link", "must lie outside base", ConfigError)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mount_point_is_refused_because_nothing_can_be_renamed_onto_it(base):
    with pytest.raises(ConfigError, match="which is a mount point: name a folder in it"):
        convert_olmoe(base, "/")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_loaded(base, tmp_path, monkeypatch):
    disk = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    refuse(base, tmp_path / "new", r"takes 0\.0 GB, only 0\.0 GB are free", ConfigError)


def test_an_empty_folder_and_missing_parents_will_do(base, tmp_path):
    (tmp_path / "empty").mkdir()
    convert_olmoe(base, tmp_path / "empty")
    convert_olmoe(base, tmp_path / "a" / "b" / "new")
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "new"):
        assert (folder / "model.safetensors").is_file()
        assert list(folder.parent.glob(".*")) == []
