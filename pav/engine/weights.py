"""New weights for an engine that runs: what is checked before vLLM sees a tensor, and their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pav.core.errors import UserError

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

# Names of the embedding and of the output matrix in the models that are served.
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Computed from the config; old checkpoints hold them, and no model takes them.
_COMPUTED = "rotary_emb.inv_freq"

Shape = tuple[int, ...]


def served_shapes(model: str) -> dict[str, Shape]:
    """Names and shapes of the tensors that a model is made of, as its files have them.

    A tied output matrix, which files leave out, is among them: vLLM keeps a copy of its own where
    it packs matrices for its kernels.

    Args:
        model: directory, or a hub id whose files are in the cache.

    Raises:
        UserError: if there are no safetensors.
    """
    from safetensors import safe_open

    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(model, local_files_only=True))
    shapes: dict[str, Shape] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    if not shapes:
        raise UserError(
            f"the model {model!r} holds no *.safetensors to compare new weights with; save it with "
            "save_pretrained"
        )
    if INPUT in shapes:
        shapes.setdefault(OUTPUT, shapes[INPUT])
    return {name: shape for name, shape in shapes.items() if not name.endswith(_COMPUTED)}


def check_weights(model: str, shapes: Mapping[str, Shape], state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of another state of ``model``.

    vLLM leaves a tensor that is missing uninitialised and does not say so; a wrong shape ends its
    engine.

    Args:
        model: for the message.
        shapes: what it is made of (:func:`served_shapes`).
        state: a transformers ``state_dict()``.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape.
    """
    for name, shape in shapes.items():
        if name not in state:
            hint = (
                "; named_parameters() leaves out a tied one: send state_dict()"
                if name == OUTPUT and INPUT in state
                else "; send the whole state_dict(), adapters merged"
            )
            raise UserError(f"the new weights of {model!r} lack {name!r}{hint}")
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"the new weights of {model!r} have {name!r} of shape {tuple(state[name].shape)}, "
                f"and the model that is served has {shape}; send weights of the same model"
            )
    for name in state:
        if name not in shapes:
            raise UserError(
                f"the new weights of {model!r} have {name!r}, which its files do not; save the "
                "model with save_pretrained and serve that directory, and merge adapters"
            )


@dataclass(frozen=True)
class Packed:
    """Weights on their way to another process.

    Attributes:
        version: of the weights.
        tensors: a safetensors file.
        tied: names of tensors that are not in it -> names of those that they are.
    """

    version: int
    tensors: bytes
    tied: dict[str, str]

    def state(self) -> dict[str, Tensor]:
        """The tensors by name."""
        from safetensors.torch import load

        found: dict[str, Tensor] = load(self.tensors)
        return found | {name: found[of] for name, of in self.tied.items()}


def packed(state: Mapping[str, Tensor], version: int) -> Packed:
    """A copy of a ``state_dict()``, on whatever device; tensors that are tied go once."""
    from safetensors.torch import save

    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[int, Shape], str] = {}
    for name, tensor in state.items():
        first = names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if first == name:
            kept[name] = tensor.detach().contiguous()
        else:
            tied[name] = first
    return Packed(version, save(kept), tied)
