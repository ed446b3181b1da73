"""The settings of quantisation."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

KINDS = ("nf4", "fp4", "none")
# From 2048 on bitsandbytes' CPU kernel falls back to a slow path.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class QuantConfig:
    """The format that the frozen base is stored in."""

    kind: str = "nf4"  # nf4 | fp4 | none (the base stays in model.dtype)
    blocksize: int = 64  # weights that share one scale
    double_quant: bool = True  # scales quantised to 8 bits too: 4.14, not 4.5 bits a weight
    # layer: each layer once for all micro-batches of a group | tile: linear by linear, each use
    dequant: str = "layer"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"quant.kind={self.kind!r}: one of {', '.join(KINDS)} is allowed")
        if self.blocksize not in BLOCKSIZES:
            raise UserError(
                f"quant.blocksize={self.blocksize}: one of {', '.join(map(str, BLOCKSIZES))} is "
                "allowed"
            )
        if self.dequant not in ("layer", "tile"):
            raise UserError(f"quant.dequant={self.dequant!r}: layer or tile is allowed")

    @property
    def is_quantised(self) -> bool:
        return self.kind != "none"
