"""A checkpoint of stage 3 in lm-eval's own hands."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.finetune_run import Run
from tests.tiny_target import save_tiny_llama

pytestmark = pytest.mark.timeout(120)


# lm-eval and peft use names of transformers and torch that are deprecated there.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lm_eval_loads_the_adapter(tmp_path):
    models = pytest.importorskip("lm_eval.models.huggingface")
    llama = save_tiny_llama(tmp_path / "llama")
    run = Run(tmp_path, llama, num_epochs=1)
    adapter = run.output / run.train().checkpoint
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
    with_adapter, without = (
        models.HFLM(pretrained=str(llama), peft=peft, device="cpu", dtype="float32")
        for peft in (str(adapter), None)
    )
    torch.testing.assert_close(without._model_call(ids), bare, rtol=0, atol=1e-5)
    # With an adapter lm-eval cuts the embeddings down to the tokenizer's tokens.
    logits = with_adapter._model_call(ids)
    num_tokens = logits.shape[-1]
    base = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    torch.testing.assert_close(logits, expected[..., :num_tokens], rtol=0, atol=1e-5)
    assert (logits - bare[..., :num_tokens]).abs().max() > 1e-2  # the adapter does something
