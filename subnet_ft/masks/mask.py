"""`SubnetMask`: one bit per weight, `True` = trainable, keyed by the names an optimizer sees."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import subnet_kernels
from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks import density
from subnet_ft.masks.names import by_canonical_name
from subnet_ft.masks.provenance import Provenance, format_fingerprint

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint


@dataclass(frozen=True)
class TensorMask:
    """The mask of one tensor.

    Args:
        bits: (ceil(N / 8),) uint8 in C order of `shape`; empty when nothing is trainable.
        shape: Shape of the parameter.
        count: K, the number of trainable weights.
    """

    bits: torch.Tensor
    shape: tuple[int, ...]
    count: int

    @property
    def num_elements(self) -> int:
        """N, the number of weights of the tensor."""
        return math.prod(self.shape)

    @classmethod
    def build(cls, bits: torch.Tensor, shape: tuple[int, ...]) -> TensorMask:
        """Count the bits and drop them when there are none."""
        count = subnet_kernels.count_bits(bits)
        return cls(bits if count else torch.empty(0, dtype=torch.uint8), shape, count)

    def full_bits(self) -> torch.Tensor:
        """Return (ceil(N / 8),) uint8, also for a tensor without trainable weights."""
        return self.bits if self.count else torch.zeros((self.num_elements + 7) // 8, dtype=torch.uint8)


class SubnetMask:
    """Which weights of a model are trainable; immutable.

    `mask[name]` is the dense bool tensor of a parameter, `True` = trainable. Every parameter of the model has an entry,
    also those in which nothing is trainable. Tied weights have one entry, under the name `named_parameters` gives.

    Args:
        tensors: Parameter name to `TensorMask`.
        provenance: Where the mask came from.
    """

    def __init__(self, tensors: Mapping[str, TensorMask], provenance: Provenance | None = None) -> None:
        self.tensors: dict[str, TensorMask] = dict(tensors)
        self.provenance = provenance or Provenance()
        for name, tensor in self.tensors.items():
            expected = (tensor.num_elements + 7) // 8 if tensor.count else 0
            if tensor.bits.dtype != torch.uint8 or tensor.bits.shape != (expected,):
                raise MaskError(
                    f"The bits of `{name}` are {tensor.bits.dtype} of shape {tuple(tensor.bits.shape)}; a tensor of "
                    f"shape {tensor.shape} with {tensor.count} trainable weights has uint8 bits of shape ({expected},)."
                )

    @classmethod
    def from_dense(cls, dense: Mapping[str, torch.Tensor], provenance: Provenance | None = None) -> SubnetMask:
        """Build a mask from bool tensors of the parameters' shapes, `True` = trainable.

        Raises:
            MaskError: A tensor is not boolean, or two names have one canonical name.
        """
        tensors = {}
        for name, value in by_canonical_name(dense.items()).items():
            if value.dtype != torch.bool:
                raise MaskError(f"The mask of `{name}` is {value.dtype}; pass a bool tensor, True = trainable.")
            packed = subnet_kernels.pack_bits(value.detach().cpu().reshape(-1))
            tensors[name] = TensorMask.build(packed, tuple(value.shape))
        return cls(tensors, provenance)

    @classmethod
    def full(cls, shapes: Mapping[str, tuple[int, ...]], provenance: Provenance | None = None) -> SubnetMask:
        """Build the mask in which every weight is trainable."""
        tensors = {}
        for name, shape in shapes.items():
            num_elements = math.prod(shape)
            bits = torch.full(((num_elements + 7) // 8,), 0xFF, dtype=torch.uint8)
            if num_elements % 8:
                bits[-1] = (1 << num_elements % 8) - 1
            tensors[name] = TensorMask(bits, tuple(shape), num_elements)
        return cls(tensors, provenance or Provenance(source={"kind": "full"}))

    @classmethod
    def load(cls, path: str | Path, base: str | Path | Checkpoint | None = None) -> SubnetMask:
        """Read a mask file; everything in it is checked and nothing is unpickled.

        Args:
            path: A `NAME.subnet.safetensors` file.
            base: The base model; every tensor's fingerprint must be the one the mask was made for.

        Raises:
            MaskFileError: The file breaks its format.
            MaskMismatchError: `base` is another model.
        """
        from subnet_ft.masks.file import load_mask

        mask = load_mask(Path(path))
        if base is not None:
            mask.check_base(base)
        return mask

    def save(self, path: str | Path) -> Path:
        """Write the mask to one safetensors file, atomically; returns its path."""
        from subnet_ft.masks.file import save_mask

        return save_mask(self, Path(path))

    @property
    def names(self) -> list[str]:
        """Every parameter name, in the model's order."""
        return list(self.tensors)

    @property
    def num_trainable(self) -> int:
        """K, the number of trainable weights."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """N, the number of weights of the model."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def density(self) -> float:
        """K / N in [0, 1]; 0 for an empty mask."""
        return self.num_trainable / max(self.num_parameters, 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits, as hexadecimal digits; provenance does not count."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}\0{tensor.shape}\0{tensor.count}\0".encode(errors="surrogatepass"))
            digest.update(tensor.bits.numpy().tobytes())
        return digest.hexdigest()

    def density_by_layer(self) -> dict[str, float]:
        """Density of every decoder layer, and of the rest under `other`."""
        return density.density_by_layer(self)

    def density_by_kind(self) -> dict[str, float]:
        """Density of every matrix kind, such as `self_attn.q_proj.weight`, over all layers."""
        return density.density_by_kind(self)

    def check(self, model: torch.nn.Module) -> None:
        """Check that the mask belongs to `model`: names, shapes, dtypes and, if recorded, the base's own weights.

        Raises:
            MaskMismatchError: Something differs; the message names the tensor and both values.
            MaskError: Two parameters have one canonical name.
        """
        parameters = by_canonical_name(model.named_parameters())
        self.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        self.check_weights((name, parameter.detach()) for name, parameter in parameters.items())

    def check_base(self, base: str | Path | Checkpoint) -> None:
        """Check that the mask was made for the checkpoint `base`, streaming it once."""
        from subnet_ft.checkpoints import Checkpoint, open_checkpoint

        checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
        self.check_shapes({name: spec.shape for name, spec in checkpoint.specs.items()})
        compared_in = self.provenance.compare_dtype
        weights = checkpoint.tensors()
        if compared_in is not None:  # the mask belongs to the base in that dtype, however it is stored
            weights = ((name, tensor.to(getattr(torch, compared_in))) for name, tensor in weights)
        self.check_weights(weights)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check names and shapes of a model's parameters against the mask's."""
        missing = [name for name in self.tensors if name not in shapes]
        extra = [name for name in shapes if name not in self.tensors]
        if missing or extra:
            raise MaskMismatchError(
                f"The mask and the model have different parameters: {listing(missing)} only in the mask, "
                f"{listing(extra)} only in the model. The mask was made for {self._base_name()}. Extract it again from "
                "a checkpoint of this model."
            )
        for name, tensor in self.tensors.items():
            if tuple(shapes[name]) != tensor.shape:
                raise MaskMismatchError(
                    f"Mask for `{name}` has shape {tensor.shape} but the parameter has shape {tuple(shapes[name])}. "
                    f"The mask was made for {self._base_name()}, not for this model. Extract it again from a "
                    "checkpoint of this model."
                )

    def check_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Compare every tensor's dtype and fingerprint with the base; a mask that records no base fits any.

        Raises:
            MaskMismatchError: A dtype or fingerprint differs, or the record of the base lacks the tensor.
        """
        if self.provenance.base is None:
            return
        for name, tensor in weights:
            self.check_fingerprint(name, tensor.dtype, subnet_kernels.fingerprint(tensor))

    def check_fingerprint(self, name: str, dtype: torch.dtype, sums: tuple[int, int]) -> None:
        """Compare one tensor's dtype and `subnet_kernels.fingerprint` with the base; as `check_weights`."""
        base = self.provenance.base
        if base is None:
            return
        stored = str(dtype).removeprefix("torch.")
        expected_dtype = base.dtypes.get(name, stored)
        if stored != expected_dtype:
            undo = f"`subnet_ft.checkpoints.undo_upcasts(model, dtype='{expected_dtype}')`"
            kept = f" If transformers keeps this weight in float32, call {undo}." if stored == "float32" else ""
            raise MaskMismatchError(
                f"`{name}` is {stored} but the mask was compared in {expected_dtype} of {self._base_name()}. Load "
                f"the model in {expected_dtype}, or extract a mask from {stored} checkpoints.{kept}"
            )
        if name not in base.fingerprints:
            raise MaskMismatchError(
                f"The mask names {self._base_name()} as its base but has no fingerprint of `{name}`, so the base "
                "cannot be checked. Extract the mask again, or make it without a base in its provenance."
            )
        found = format_fingerprint(sums)
        if found != base.fingerprints[name]:
            raise MaskMismatchError(
                f"The weights of `{name}` are not those that the mask was made for ({self._base_name()}): "
                f"fingerprint {found}, expected {base.fingerprints[name]}. Start from that base, or extract a "
                "mask for this one."
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise KeyError(f"`{name}` is not a parameter of this mask")
        tensor = self.tensors[name]
        return subnet_kernels.unpack_bits(tensor.full_bits(), tensor.num_elements).view(tensor.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SubnetMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __and__(self, other: SubnetMask) -> SubnetMask:
        return self._combine(other, torch.bitwise_and, "intersection")

    def __or__(self, other: SubnetMask) -> SubnetMask:
        return self._combine(other, torch.bitwise_or, "union")

    def __sub__(self, other: SubnetMask) -> SubnetMask:
        return self._combine(other, lambda a, b: a & ~b, "difference")

    def __invert__(self) -> SubnetMask:
        full = SubnetMask.full({name: tensor.shape for name, tensor in self.tensors.items()})
        return full._combine(self, lambda a, b: a & ~b, "complement", provenance_of=self)

    def __repr__(self) -> str:
        return (
            f"SubnetMask({len(self.tensors)} tensors, {self.num_trainable:,} of {self.num_parameters:,} weights "
            f"trainable, density {self.density:.4f})"
        )

    def _combine(
        self,
        other: SubnetMask,
        operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        kind: str,
        provenance_of: SubnetMask | None = None,
    ) -> SubnetMask:
        self.check_shapes({name: tensor.shape for name, tensor in other.tensors.items()})
        self.check_same_base(other)
        tensors = {
            name: TensorMask.build(operation(tensor.full_bits(), other.tensors[name].full_bits()), tensor.shape)
            for name, tensor in self.tensors.items()
        }
        sources = [provenance_of] if provenance_of else [self, other]
        source = {"kind": kind, "of": [mask.provenance.source for mask in sources]}
        # Two recorded bases are one here, so the cast of either side holds for both.
        sides = (self.provenance, other.provenance)
        owners = [side for side in sides if side.base is not None] or list(sides)
        compared_in = next((side.compare_dtype for side in owners if side.compare_dtype is not None), None)
        return SubnetMask(tensors, Provenance(base=owners[0].base, compare_dtype=compared_in, source=source))

    def check_same_base(self, other: SubnetMask) -> None:
        """Check that two masks were made for one base in one dtype; a mask that records no base goes with any.

        Raises:
            MaskMismatchError: The recorded weights differ.
        """
        left, right = self.provenance.base, other.provenance.base
        if left is None or right is None:
            return
        if (left.fingerprints, left.dtypes) != (right.fingerprints, right.dtypes):
            cast = {mask.provenance.compare_dtype or "the stored dtype" for mask in (self, other)}
            how = f", compared in {' and '.join(sorted(cast))}" if len(cast) > 1 else ""
            raise MaskMismatchError(
                f"The masks were made for different bases, {left.name} and {right.name}{how}; they cannot be combined. "
                "Extract both from one base with one `dtype`."
            )

    def _base_name(self) -> str:
        base = self.provenance.base
        return f"`{base.name}`" if base else "a base that the mask does not name"
