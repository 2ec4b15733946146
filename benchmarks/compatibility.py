#!/usr/bin/env python3
"""Which architectures of timm, torchvision and transformers can be made sparse, and what of them stays dense.

    python benchmarks/compatibility.py
    python benchmarks/compatibility.py --only vit bert --json /tmp/few.json

Each is built in a small size with random weights, and then converted, run, trained, updated, compiled, saved, loaded,
and made dense again. A check that fails says why. Needs ``pip install timm transformers``; nothing is downloaded.
"""

import argparse
import copy
import importlib.metadata
import io
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import command_line, environment, write_results
from torch import Tensor, nn

import sparse_moon as sm

SPARSITY = 0.8
RESULTS = Path(__file__).parent / "results" / "compatibility.json"
TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and what to call it with.

    Attributes:
        inputs: keyword arguments, or one tensor.
        compiled: whether ``torch.compile`` is tried.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor | dict[str, Any]]
    compiled: bool = False


@dataclass
class Row:
    """What came of one architecture; checks are ``"ok"`` or a reason.

    Attributes:
        weights: of the whole model, as dense tensors.
        share: of them that is left out.
        dense: share of all weights that each type of module keeps dense.
        said: what the conversion warned of.
    """

    library: str
    name: str
    weights: int = 0
    share: float = 0.0
    dense: dict[str, float] = field(default_factory=dict)
    said: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    time_s: float = 0.0

    @property
    def silent(self) -> bool:
        """Whether the sparsity was missed by more than the rule of ``sparsify`` allows, and nothing said so."""
        missed = self.share < SPARSITY - 0.011
        return self.checks["convert"] == "ok" and missed and "was asked for" not in self.said

    @property
    def outcome(self) -> str:
        """Whether the sparsity was reached, and said where not."""
        if self.checks["convert"] != "ok":
            return "refused"
        return "**not said**" if self.silent else "said" if "was asked for" in self.said else "reached"


def image(size: int = 64, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


def tokens(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": torch.randint(3, 90, (2, 12)), **{k: make() for k, make in more.items()}}


def timm_models() -> Iterator[Architecture]:
    import timm

    plain = (
        "resnet10t", "nf_resnet26", "regnetx_002", "regnety_002", "mobilenetv3_small_050", "mobilenetv4_conv_small_035",
        "efficientnet_b0", "convnext_atto", "edgenext_xx_small", "ghostnet_050", "repvgg_a0", "hrnet_w18_small",
        "fastvit_t8", "mobileone_s0", "xcit_nano_12_p16_224",
    )  # fmt: skip
    short = {"img_size": 64, "depth": 4}
    options: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_224": short, "deit_tiny_patch16_224": short,
        "eva02_tiny_patch14_224": short | {"img_size": 56},
        "swin_tiny_patch4_window7_224": {
            "img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8),
        },
    }  # fmt: skip
    compiled = {"resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"}
    for name in (*plain, *options):
        size = 56 if name.startswith("eva") else 64
        yield Architecture(
            "timm", name, lambda n=name: timm.create_model(n, num_classes=10, **options.get(n, {})), image(size),
            name in compiled,
        )  # fmt: skip


def torchvision_models() -> Iterator[Architecture]:
    import torchvision.models as tv

    for name in ("resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "densenet121"):
        make = getattr(tv, name)
        yield Architecture("torchvision", name, lambda m=make: m(num_classes=10), image(64), name == "mobilenet_v2")
    yield Architecture(
        "torchvision",
        "VisionTransformer",
        lambda: tv.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),
        image(32),
    )
    yield Architecture(
        "torchvision", "lraspp_mobilenet_v3_large",
        lambda: tv.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), image(64),
    )  # fmt: skip


def transformers_models() -> Iterator[Architecture]:
    import transformers as tr

    def model(kind: str, config: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(tr, kind)(copy.deepcopy(config))

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 100}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpt2 = tr.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, **ids)
    llama = {**small, **ids, "num_key_value_heads": 2}
    t5 = tr.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, **ids)
    mamba = tr.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **ids)
    vit = tr.ViTConfig(image_size=32, patch_size=8, **small)
    segformer = tr.SegformerConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32)
    wav2vec = tr.Wav2Vec2Config(
        conv_dim=(32, 32), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.0, **small,
    )  # fmt: skip
    pixels = {"pixel_values": lambda: torch.randn(2, 3, 32, 32)}
    yield Architecture("transformers", "BERT", model("BertModel", tr.BertConfig(**small, **ids)), tokens(), True)
    yield Architecture("transformers", "RoBERTa", model("RobertaModel", tr.RobertaConfig(**small, **ids)), tokens())
    yield Architecture("transformers", "GPT-2", model("GPT2LMHeadModel", gpt2), tokens())
    yield Architecture("transformers", "GPT-2 classifier", model("GPT2ForSequenceClassification", gpt2), tokens())
    yield Architecture("transformers", "Llama", model("LlamaForCausalLM", tr.LlamaConfig(**llama)), tokens(), True)
    yield Architecture("transformers", "Qwen2", model("Qwen2ForCausalLM", tr.Qwen2Config(**llama)), tokens())
    mixtral = tr.MixtralConfig(**llama, num_local_experts=4)
    yield Architecture("transformers", "Mixtral", model("MixtralForCausalLM", mixtral), tokens())
    decoder = tokens(decoder_input_ids=lambda: torch.randint(3, 90, (2, 6)))
    yield Architecture("transformers", "T5", model("T5ForConditionalGeneration", t5), decoder)
    yield Architecture("transformers", "Mamba", model("MambaForCausalLM", mamba), tokens())
    yield Architecture("transformers", "ViT", model("ViTModel", vit), lambda: {k: make() for k, make in pixels.items()})
    yield Architecture(
        "transformers", "SegFormer", model("SegformerForSemanticSegmentation", segformer),
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    )  # fmt: skip
    yield Architecture(
        "transformers", "Wav2Vec2", model("Wav2Vec2Model", wav2vec), lambda: {"input_values": torch.randn(2, 2000)}
    )


class LanguageModel(nn.Module):
    """Embedding, LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(100, 64), nn.LSTM(64, 128), nn.Linear(128, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(input_ids))[0])


def torch_models() -> Iterator[Architecture]:
    yield Architecture(
        "torch", "TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2),
        lambda: torch.randn(2, 12, 64), True,
    )  # fmt: skip
    yield Architecture(
        "torch", "Transformer", lambda: nn.Transformer(64, 4, 1, 1, 128, batch_first=True),
        lambda: {"src": torch.randn(2, 12, 64), "tgt": torch.randn(2, 6, 64)},
    )  # fmt: skip
    yield Architecture("torch", "LSTM language model", LanguageModel, tokens())


LIBRARIES = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "torch": torch_models,
}


def run(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """All floating point tensors of the output, as one vector."""
    output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return torch.cat([t.flatten() for t in _tensors(output) if t.is_floating_point()])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def built(architecture: Architecture, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return architecture.build()


def check_forward(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    assert run(model.eval(), inputs).isfinite().all(), "the output is not finite"


def check_training(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    run(model.train(), inputs).square().mean().backward()
    layers = sm.sparse_layers(model)
    without = [name for name, layer in layers.items() if layer.values.grad is None]
    assert len(without) < max(len(layers), 1), "no gradients"
    assert all(layer.values.grad.isfinite().all() for layer in layers.values() if layer.values.grad is not None)


def check_update(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 1e-3), total_steps=8, interval=1)
    before = {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}
    updates = 0
    for _ in range(2):
        method.optimizer.zero_grad()
        (run(model.train(), inputs) - 1).square().mean().backward()  # a gradient also where all outputs begin at 0
        updates += method.step()
    after = {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}
    assert updates == 1 and any(not torch.equal(before[name], after[name]) for name in before), "nothing moved"
    assert all(before[name].sum() == after[name].sum() for name in before), "another number of weights"


def check_saving(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = sm.sparsify(built(architecture, seed=1), SPARSITY)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(run(other.eval(), inputs), run(model.eval(), inputs))


def check_dense(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    expected = run(model.eval(), inputs)
    dense = sm.densify(copy.deepcopy(model))
    assert not any(type(module).__module__.startswith("sparse_moon") for module in dense.modules()), "not plain torch"
    torch.testing.assert_close(run(dense, inputs), expected, rtol=1e-3, atol=1e-4)


def check_compiled(model: nn.Module, inputs: Any, architecture: Architecture) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model).eval(), backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(model.eval(), inputs), rtol=1e-3, atol=1e-4)


CHECKS = {
    "forward": check_forward,
    "training": check_training,
    "update": check_update,
    "save, load": check_saving,
    "densify": check_dense,
    "compile": check_compiled,
}


def try_out(architecture: Architecture) -> Row:
    row = Row(architecture.library, architecture.name)
    started = time.perf_counter()
    model = built(architecture, seed=0)
    row.weights = sm.summary(model).weights
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = sm.sparsify(model, SPARSITY)
        summary = sm.summary(model)
        row.share = summary.sparsity
        row.dense = {kind: share for kind, share in summary.dense_share.items() if share >= 0.001}
        row.said = " ".join(str(w.message) for w in caught if w.filename == __file__)
        row.checks["convert"] = "ok"
    except Exception as error:
        row.checks["convert"] = _reason(error)
    if row.checks["convert"] == "ok":
        inputs = architecture.inputs()
        for name, check in CHECKS.items():
            if name == "compile" and not architecture.compiled:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    check(model, inputs, architecture)
                    row.checks[name] = "ok"
                except Exception as error:
                    row.checks[name] = _reason(error)
    row.time_s = time.perf_counter() - started
    return row


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown, and below it what failed."""
    names = ["convert", *CHECKS]
    yield "| architecture | weights | left out | sparsity | dense weights | " + " | ".join(names) + " |"
    yield "|---|--:|--:|---|---|" + "---|" * len(names)
    for library in LIBRARIES:
        for row in (row for row in rows if row.library == library):
            dense = ", ".join(f"{kind} {share:.1%}" for kind, share in row.dense.items())
            marks = [{"ok": "ok", "": ""}.get(row.checks.get(name, ""), "fails") for name in names]
            title = f"{row.library} {row.name}"
            cells = [title, f"{row.weights / 1e6:.2f} M", f"{row.share:.3f}", row.outcome, dense, *marks]
            yield "| " + " | ".join(cells) + " |"
    failed = [(row, name, text) for row in rows for name, text in row.checks.items() if text != "ok"]
    if failed:
        yield ""
        yield from (f"- {row.library} {row.name}, {name}: `{text}`" for row, name, text in failed)


HEAD = """# Compatibility

What `sparsify(model, {sparsity})` makes of {count} architectures, in small sizes and with random weights: the share of
all weights that is left out; whether that is what was asked for, or the shortfall was said, or the model refused; which
types of modules hold the dense weights (layers that the allocation keeps dense among them); and what works afterwards:
a forward pass in evaluation mode, a backward pass, a RigL update, a round trip through `state_dict`, `densify` with the
same outputs, and `torch.compile` where it was tried.

Shortfalls that were not said: {silent}.

Written by `python benchmarks/compatibility.py` on {date} with torch {torch}, {versions}; rows in
`benchmarks/results/compatibility.json`.
"""


def document(head: Mapping[str, Any], rows: list[Row]) -> str:
    silent = ", ".join(row.name for row in rows if row.silent) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    text = HEAD.format(
        sparsity=SPARSITY, count=len(rows), silent=silent, date=head["date"], torch=head["torch"], versions=versions
    )
    return "\n".join([text, *table(rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="architectures whose name contains one of these")
    parser.add_argument("--json", type=Path, help=f"results file to write; with all architectures {RESULTS.name}")
    arguments = parser.parse_args()
    rows, versions = [], {}
    for library, architectures in LIBRARIES.items():
        if library != "torch":
            versions[library] = importlib.metadata.version(library)
        for architecture in architectures():
            if arguments.only and not any(part.lower() in architecture.name.lower() for part in arguments.only):
                continue
            row = try_out(architecture)
            rows.append(row)
            failed = [f"{name}: {text}" for name, text in row.checks.items() if text != "ok"]
            state = "SILENT" if row.silent else "said" if "was asked for" in row.said else "reached"
            print(
                f"{library:13}{row.name:32}{row.share:.3f}  {state:8}{row.time_s:6.1f} s  {'; '.join(failed)}",
                flush=True,
            )
    head = environment(torch.device("cpu")) | {
        "versions": versions,
        "sparsity": SPARSITY,
        "command": command_line(sys.argv[1:]),
    }
    path = arguments.json or (None if arguments.only else RESULTS)
    if path:
        write_results(path, {**head, "rows": [asdict(row) for row in rows]})
    if not arguments.only:
        _, heading, rest = TABLE.read_text().partition("\n## Layers\n")  # which is written by hand
        TABLE.write_text(document(head, rows) + heading + rest)
    print(*table(rows), sep="\n")
    silent = [row.name for row in rows if row.silent]
    failed = [row.name for row in rows if any(text != "ok" for text in row.checks.values())]
    if silent or failed:
        raise SystemExit(f"a shortfall was not said: {silent or 'none'}; checks failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
