"""What a finished run leaves: the adapter without optimizer states, and the merged model."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from selectmoe.finetune.exports import merge_into_base
from selectmoe.training.adapter_folder import adapter_folder
from tests.finetune_run import Run
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_target import save_tiny_llama

# PEFT asks transformers by a name that it has given up; nothing of ours causes it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
IDS = torch.arange(4, 30)[None]


@pytest.fixture(
    scope="module",
    params=[save_tiny_llama, save_tiny_olmoe, None],
    ids=["llama", "olmoe", "default"],
)
def run(request, tmp_path_factory):
    """A finished run on a Llama, an OLMoE or the embedded Select-MoE."""
    folder = tmp_path_factory.mktemp("run")
    model = request.param and request.param(folder / "base")
    finished = Run(folder, model, num_epochs=1, lr_scheduler_type="cosine")
    finished.train()
    return finished


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_final_folder_has_the_adapter_and_its_tokenizer_alone(run):
    adapter = run.output / "adapter"
    names = {file.name for file in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not [n for n in names if n.startswith(("optimizer", "scheduler", "rng", "trainer"))]
    assert adapter_folder(run.output) == adapter
    checkpoint = run.output / "checkpoint-5"
    assert (checkpoint / "optimizer.pt").is_file()  # it can still be resumed
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (adapter / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_merged_model_computes_what_base_and_adapter_do(run):
    merged = merge_into_base(run.config, run.output)
    assert merged == run.output / "merged"
    base = AutoModelForCausalLM.from_pretrained(
        run.config.model or Run.embedded_folder(), dtype=torch.float32
    )
    if hasattr(base, "force_gates_open"):
        base.force_gates_open()
    adapted = PeftModel.from_pretrained(base, run.output / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    # The embedded model is stored in bfloat16, to whose 8 bits the merged weights are rounded.
    tolerance = 2e-2 if run.config.model is None else 1e-4
    expected = logits(adapted)
    torch.testing.assert_close(
        logits(plain), expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template
    mode = (merged / "model.safetensors").stat().st_mode
    assert mode == (merged / "config.json").stat().st_mode


def test_cosine_decay_ends_at_zero_by_another_way_than_linear(run):
    rates = [row["learning_rate"] for row in run.metrics()]
    # 5 steps, of which 1 is warm-up: 1e-2 * (1 + cos(pi * k / 4)) / 2 after k steps.
    expected = [1e-2 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) / 2 for k in range(4)]
    assert rates[1:] == pytest.approx(expected, rel=1e-5)
