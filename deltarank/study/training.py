"""Training: parameters frozen or adapters added, layers compiled, Trainer run."""

from __future__ import annotations

import contextlib
import math
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.runtime import device, product_dtype, progress, visible_gpus
from deltarank.study.configs import OWN_OPTIMIZERS, VARIANTS, RunConfig
from deltarank.study.losses import AnswerModel, packs, require_own_loss
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.optimizers import own_optimizer
from deltarank.study.tasks import a_line_each, encode, load_split, pack, permute_answers
from deltarank.study.variants import variant_adapter

if TYPE_CHECKING:  # PEFT is imported where it trains
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tinylora.layer import TinyLoraLayer

GRAPHS = 64  # compiled graphs of a layer in one process: one for every LoRA rank of a long sweep


def has_compiler() -> bool:
    """Whether torch.compile can build kernels here: a C++ compiler and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def prepare(config: RunConfig) -> nn.Module:
    """The model that `config` trains: parameters frozen or adapters added, layers compiled.

    Raises ValueError as adapted_matrices does, and for a model whose loss is not ours.
    """
    from peft import get_peft_model

    model = load_model(config.model)
    require_own_loss(model)
    model.get_input_embeddings().weight.requires_grad_(config.train_embedding)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    if config.adapter:
        torch.manual_seed(config.seed)
        with quiet_peft():
            model = get_peft_model(model, adapter_config(config, model))
    # What is told apart by more than its weights would be compiled layer by layer.
    alike = not config.rank_pattern and config.method in ("full", "lora", "loraplus", "pissa")
    if config.compile and alike:
        compile_layers(layers)
    return model


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile layers of a model, where there is a compiler."""
    if has_compiler():
        for layer in layers:  # one small graph, shared by all layers and lengths of a batch
            layer.compile(dynamic=True, recompile_limit=GRAPHS)


def adapted_matrices(config: RunConfig, model: nn.Module) -> dict[str, Tensor]:
    """The matrices that an adapter is on, by parameter name.

    Raises ValueError as `matrices` does, for a rank above the smallest of them where that is a
    bound, for an OFT whose blocks do not fill their inputs, and for more numbers of a TinyLoRA than
    they tell apart.
    """
    found = matrices(model, layers=config.layers, modules=config.modules)
    if config.method == "oft":
        inputs = math.gcd(*(weight.shape[1] for weight in found.values()))
        cure = f"choose 2 or more that divide {inputs}"
        require(config.rank > 1 and inputs % config.rank == 0, f"rank={config.rank}: {cure}")
    elif config.method not in ("randlora", "vera"):
        require_rank(config.rank, found)
    most = len(found) * config.rank**2
    told = f"{len(found)} matrices at rank {config.rank} tell {most} numbers apart"
    require(config.vector <= most, f"vector={config.vector}: {told}; choose at most {most}")
    return found


def require_rank(rank: int, adapted: dict[str, Tensor]) -> None:
    """Raise ValueError for a rank above the smallest of the matrices."""
    smallest = min(adapted.values(), key=lambda weight: min(weight.shape)).shape
    cure = f"choose at most {min(smallest)}"
    require(
        rank <= min(smallest), f"rank={rank} is above the smallest matrix {tuple(smallest)}; {cure}"
    )


def adapter_config(config: RunConfig, model: nn.Module) -> PeftConfig:
    """What PEFT is told of the adapter.

    A TinyLoRA draws the random matrices of its i-th layer with the seed projection_seed + i, so
    that seeds have to lie further apart than a model has matrices.
    """
    from peft import LoraConfig, TinyLoraConfig

    names = [name.removesuffix(".weight") for name in adapted_matrices(config, model)]
    if config.method in VARIANTS:
        return variant_adapter(config, names)
    if config.method == "tinylora":
        return TinyLoraConfig(
            r=config.rank,
            u=config.vector,
            weight_tying=1.0,  # one vector for all matrices
            projection_seed=100_000 * config.seed,
            target_modules=names,
        )
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT says int, any number will do
        use_rslora=config.rslora,
        rank_pattern=dict(config.rank_pattern),
        target_modules=names,
    )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep two warnings out: PEFT 0.21 uses a name that transformers has renamed.

    And SHiRA makes sparse tensors; PyTorch, once told whether to check such, warns no more.
    """
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(False):
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def lora_layers(model: nn.Module) -> dict[str, LoraLayer | TinyLoraLayer]:
    """PEFT's adapted layers by the parameter name of the matrix that each one updates."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tinylora.layer import TinyLoraLayer

    modules = model.get_base_model().named_modules()
    return {f"{n}.weight": m for n, m in modules if isinstance(m, LoraLayer | TinyLoraLayer)}


@torch.no_grad()
def plant(model: nn.Module, factors: Callable[[str], tuple[Tensor, Tensor]]) -> None:
    """Make the update of each matrix with a LoRA B @ A, factors(name); zeros fill the rank."""
    for name, layer in lora_layers(model).items():
        B, A = factors(name)  # (m, k), (k, n)
        more, scale = layer.r["default"] - len(A), layer.scaling["default"]
        layer.lora_B["default"].weight.copy_(F.pad(B / scale, (0, more)))
        layer.lora_A["default"].weight.copy_(F.pad(A, (0, 0, 0, more)))


def lora_factors(layer: LoraLayer | TinyLoraLayer) -> tuple[Tensor, Tensor, float]:
    """B (m, r), A (r, n) and the scale of one adapted layer, whose update is scale * B @ A.

    Of a TinyLoRA B is what is fixed on the left times R, the trained sum of its random matrices.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        (v,) = layer.tinylora_v["default"].values()  # type: ignore[index]  # (u,), set by now
        R = torch.einsum("i,ijk->jk", v.detach(), layer.tinylora_P["default"].to(v))  # (r, r)
        return layer.tinylora_B["default"] @ R, layer.tinylora_A["default"], 1.0
    B, A = (part["default"].weight.detach() for part in (layer.lora_B, layer.lora_A))
    return B, A, layer.scaling["default"]


def train(
    config: RunConfig,
    model: nn.Module,
    *,
    label: str = "",
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train `model` in place; return the answer loss of every step, in nats to bfloat16 accuracy.

    Calls `after_step` with the number of steps done.  Raises ValueError for fewer rows than a
    batch.
    """
    trained = AnswerModel(model, product_dtype(config.dtype))
    return fit(config, trained, _training_rows(config), label=label, after_step=after_step)


def fit(
    config: RunConfig,
    trained: AnswerModel,
    rows: list[dict[str, list[int]]],
    *,
    label: str = "",
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train on these rows, in place, by the loss that `trained` makes; return it of every step.

    Rows go end to end where the model keeps them apart, a line each where it does not (see packs).
    Stops at a loss that is NaN or infinite, which is then the last one.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Step(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update()
            finite = math.isfinite(trained.losses[-1])
            control.should_training_stop |= not finite
            if finite:
                after_step(state.global_step)

    with tempfile.TemporaryDirectory() as scratch, progress(config.steps, label) as bar:
        trainer = Trainer(
            model=trained,
            args=_training_arguments(config, scratch),
            train_dataset=rows,
            data_collator=pack if packs(trained.model) else a_line_each,
            callbacks=[Step()],
            optimizers=(own_optimizer(config, trained), None),  # None: as the arguments say
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trained.losses


def _training_rows(config: RunConfig) -> list[dict[str, list[int]]]:
    """The rows to train on as tokens; raises ValueError for fewer than a batch.

    Of a permuted run they come once for every time that they are seen, each time permuted anew,
    or the answers of one permutation would be learned by heart; a prompt may then meet a longer
    answer than its own.
    """
    rows, length = load_split(config.task, "train"), config.seq_len
    require(
        len(rows) >= config.batch_size,
        f"{config.task} has {len(rows)} training rows, fewer than batch_size={config.batch_size}",
    )
    if config.permuted:
        epochs = range(math.ceil(config.steps * config.batch_size / len(rows)))
        rows = [row for epoch in epochs for row in permute_answers(rows, epoch)]
        length *= 2
    tokenizer = load_tokenizer(config.model)
    return [encode(row, tokenizer, length) for row in rows]


def _training_arguments(config: RunConfig, scratch: str):
    """What Trainer is told; of several GPUs it is to use one, as its batch is one batch."""
    from transformers import TrainingArguments

    class OneDevice(TrainingArguments):
        @property
        def n_gpu(self) -> int:
            return min(super().n_gpu, 1)

    if visible_gpus() > 1:
        warnings.warn(f"{visible_gpus()} GPUs are visible, one is used", stacklevel=3)
    return OneDevice(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        warmup_steps=math.ceil(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        optim="sgd" if config.optimizer in OWN_OPTIMIZERS else config.optimizer,
        seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=device().type == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )
