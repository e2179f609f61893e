"""Transformers of the Hugging Face library, built from small random configurations, before and after a swap.

The library is installed by `scripts/run.py test --full` alone, and takes seconds to import.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manualprop
from manualprop._swap import TWINS

MISSING = [name for name in ["transformers"] if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason="`scripts/run.py test --full` installs it"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = torch.tensor([[5, 3, 9, 11, 4, 7, 2], [8, 6, 2, 10, 3, 3, 9]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, pad_token_id=0, **SIZES))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def text() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS}


def images() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


# {name: (model, inputs, layers swapped, classes left)}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], int, set[str]]] = {
    "bert": (
        bert,
        lambda: text() | {"labels": torch.tensor([0, 1])},
        31,
        {"GELUActivation", "function gelu"},
    ),
    "gpt2": (gpt2, text, 23, {"NewGELUActivation"}),
    "llama": (llama, text, 16, {"SiLUActivation", "LlamaRMSNorm", "LlamaRotaryEmbedding"}),
    "vit": (vit, images, 22, {"ViTEmbeddings", "GELUActivation", "function gelu"}),
    "t5": (t5, text, 58, {"T5LayerNorm"}),
}
NAMES = pytest.mark.parametrize("name", MODELS)
FUSE = pytest.mark.parametrize("fuse", [False, True])


def made(
    name: str, dtype: torch.dtype = torch.float64, swapped: bool = False, fuse: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype).train()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in MODELS[name][1]().items()}
    if swapped:
        manualprop.swap(model, fuse=fuse)
    return model, inputs


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**inputs)
    output.loss.backward()
    return (
        output.logits.detach(),
        output.loss.detach(),
        {name: p.grad for name, p in model.named_parameters()},
    )


def assert_same_step(name: str, fuse: bool, **options: Any) -> None:
    found = []
    for swapped in (False, True):
        model, inputs = made(name, swapped=swapped, fuse=fuse)
        if options:
            model.gradient_checkpointing_enable(**options)  # type: ignore[operator]
        found.append(step(model, inputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@NAMES
def test_what_is_swapped_and_what_is_left(name: str) -> None:
    model, _ = made(name)
    before = [type(module) for module in model.modules()]
    report = manualprop.swap(model)
    _, _, count, left = MODELS[name]
    assert len(report.swapped) == count and {row.before for row in report.left} == left
    assert [type(m) for m in manualprop.unswap(model).model.modules()] == before


# {name: (how many are fused, and into what)}
FUSED = {
    "bert": (2, "FusedBertLayer: intermediate.intermediate_act_fn+output.dense"),
    "gpt2": (2, "FusedGPT2MLP: act+c_proj"),
    "llama": (2, "FusedLlamaMLP: act_fn+down_proj"),
    "vit": (2, "FusedViTMLP: activation_fn+fc2"),
    "t5": (4, "FusedT5DenseActDense: act+dropout+wo"),
}


@NAMES
def test_what_is_fused_and_taken_apart_again(name: str) -> None:
    model, _ = made(name)
    before = [type(module) for module in model.modules()]
    rows = manualprop.swap(model, fuse=True).rows
    count, after = FUSED[name]
    fused = [row.after for row in rows if (row.after or "").startswith("Fused")]
    assert fused == [after] * count
    assert [type(m) for m in manualprop.unswap(model).model.modules()] == before


def test_gpt2_keeps_less_and_its_weights_stay_transposed() -> None:
    """Its layers are transformers' Conv1D, whose weights are (in, out)."""
    from transformers.pytorch_utils import Conv1D

    kept = []
    for fuse in (None, False, True):
        model, inputs = made("gpt2", swapped=fuse is not None, fuse=bool(fuse))
        kept.append(manualprop.receipt(model, **inputs).kept)
    layers = [module for module in model.modules() if isinstance(module, Conv1D)]
    step(model, inputs)
    assert len(layers) == 8 and all(type(layer) is not Conv1D for layer in layers)
    assert all(layer.weight.grad.stride() == layer.weight.stride() == (layer.nf, 1) for layer in layers)
    assert kept[2] < kept[1] < kept[0]


@FUSE
@NAMES
def test_outputs_and_gradients(name: str, fuse: bool) -> None:
    assert_same_step(name, fuse)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@FUSE
@NAMES
def test_the_check_agrees(name: str, fuse: bool, dtype: torch.dtype, mode: str) -> None:
    model, inputs = made(name, dtype)
    check = manualprop.swap(getattr(model, mode)(), check=inputs, fuse=fuse).check
    # How much of FACTOR is used; a step beyond this is a change to look into.
    assert check is not None and check.ratio < 0.6, check


@pytest.mark.parametrize("planted", ["value", "gradient"])
@NAMES
def test_the_check_names_the_wrong_layer(name: str, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a million, in one layer, of a bfloat16 model."""
    model, inputs = made(name, torch.bfloat16)
    layers = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    # Dropout comes after it, or an activation, or a residual: whatever is there must not hide it.
    victim = layers[len(layers) // 2]
    layer, right = model.get_submodule(victim), manualprop.nn.Linear.forward

    def wrong(self: Any, input: Tensor) -> Tensor:
        y = right(self, input)
        if self is not layer:
            return y
        return y * (1 + 1e-6) if planted == "value" else y + 1e-6 * (y - y.detach())

    monkeypatch.setattr(manualprop.nn.Linear, "forward", wrong)
    before = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=rf"manualprop\.nn\.Linear at '{victim}' the model differs"):
        manualprop.swap(model, check=inputs)
    assert [type(module) for module in model.modules()] == before


@FUSE
@NAMES
def test_twenty_steps_of_training(name: str, fuse: bool) -> None:
    losses: dict[bool, list[float]] = {}
    for swapped in (False, True):
        model, inputs = made(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if swapped:
            manualprop.swap(model, fuse=fuse)
        torch.manual_seed(1)
        losses[swapped] = []
        for _ in range(20):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[swapped].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-7)
    assert losses[True][-1] < losses[True][0]


@FUSE
@NAMES
def test_saved_and_loaded(name: str, fuse: bool, tmp_path: Path) -> None:
    """A swapped model writes what a plain one writes, to the byte, and a plain class loads it; then it swaps again."""
    plain, inputs = made(name, torch.float32)
    swapped = manualprop.swap(copy.deepcopy(plain), fuse=fuse).model
    plain.save_pretrained(tmp_path / "plain")
    swapped.save_pretrained(tmp_path / "swapped")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "swapped" / file).read_bytes(), file
    loaded = type(plain).from_pretrained(tmp_path / "swapped")
    assert not any(type(module) in TWINS.values() for module in loaded.modules())
    manualprop.swap(loaded, fuse=fuse)
    torch.testing.assert_close(loaded(**inputs).logits, swapped.eval()(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@FUSE
@NAMES
def test_gradient_checkpointing(name: str, fuse: bool, reentrant: bool) -> None:
    assert_same_step(name, fuse, gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@FUSE
@NAMES
def test_autocast_to_bfloat16(name: str, fuse: bool) -> None:
    """Training in mixed precision, each as far from float64 as the other; the check runs under it too."""
    exact = step(*made(name, torch.float64))
    errors = []
    for swapped in (False, True):
        model, inputs = made(name, torch.float32, swapped, fuse)
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss, gradients = step(model, inputs)
        errors.append(
            [
                (a.double() - b).norm().item()
                for a, b in zip(
                    (logits, loss, *gradients.values()), (exact[0], exact[1], *exact[2].values()), strict=True
                )
                if a is not None
            ]
        )
    total = [sum(error) for error in errors]
    assert 0 < total[1] < 1.2 * total[0]
    model, inputs = made(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert manualprop.swap(model, check=inputs, fuse=fuse).check is not None


@FUSE
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate(name: str, fuse: bool) -> None:
    """Greedy, by beams, and sampled: the same tokens, with and without a cache."""
    ways = [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 3},
        {"do_sample": True},
    ]
    found = []
    for swapped in (False, True):
        model, inputs = made(name, swapped=swapped, fuse=fuse)
        model.eval()
        tokens = []
        for way in ways:
            torch.manual_seed(4)
            prompt = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(MASK)}
            tokens.append(model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, **way).tolist())
        found.append(tokens)
    assert found[1] == found[0] and len(found[0][0][0]) > 6
