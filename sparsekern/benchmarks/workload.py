"""What can be timed: an operation, its sizes, and what its input looks like."""

from __future__ import annotations

from dataclasses import dataclass

DENSE_INPUT = (
    "linear_topk", "SparseAutoencoder", "training step", "SparseBottleneck", "VAE-SAE step",
    "accelerate",
)  # fmt: skip
# Operations on tensors with channels.
BY_CHANNEL = ("channel_threshold", "SpatialSparsity", "pointwise_conv")


@dataclass(frozen=True)
class Workload:
    """One thing to time: an operation, its sizes, and what its input looks like.

    Sizes that an operation does not have are 0. rows: of the input, or of a batch; n: latents;
    k: how many are kept; d: features of the dense side. Operations BY_CHANNEL have rows entries of
    channels at positions, of which the share density is kept or active; outputs: channels of the
    convolution's output. file_rows: rows of an activation file.
    """

    op: str
    rows: int = 0
    n: int = 0
    k: int = 0
    d: int = 0
    dtype: str = "float32"
    mode: str = "forward"
    fill: str = "normal"
    layout: str = "row-major"
    device: str = "cpu"
    autocast: str = ""
    channels: int = 0
    positions: int = 0
    outputs: int = 0
    density: float = 0.0
    file_rows: int = 0

    @property
    def case(self) -> str:
        """The sizes, in the order in which the operation's arguments name them."""
        if self.op == "sparse_matmul":
            return f"B={self.rows} k={self.k} n={self.n} d={self.d}"
        if self.op in DENSE_INPUT:
            return f"B={self.rows} d={self.d} n={self.n} k={self.k}"
        if self.op == "adam_step":
            return f"two {self.n} x {self.d} matrices"
        if self.op == "count_active":
            return f"{self.rows * self.k} codes n={self.n}"
        if self.op in BY_CHANNEL:
            shape = f"({self.rows}, {self.channels}, {self.positions})"
            if self.layout == "row-major":
                shape = f"({self.rows * self.positions}, {self.channels})"
            if self.op == "pointwise_conv":
                return f"{shape} to {self.outputs} channels, density {self.density:g}"
            return f"{shape}, density {self.density:.1g}"
        if self.op == "ActivationStore":
            return f"{self.file_rows * self.d * 2 / 1e9:.3g} GB, d={self.d}, batches of {self.rows}"
        return f"B={self.rows} n={self.n} k={self.k}"

    def __str__(self) -> str:
        plain = {"forward", "normal", "row-major", "cpu"}
        extras = [e for e in (self.mode, self.fill, self.layout, self.device) if e not in plain]
        extras += [f"{self.autocast} autocast"] * bool(self.autocast)
        return " ".join([self.op, self.case, self.dtype, *extras])

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of an autoencoder take: two matrices, two biases, in float32."""
        return 4 * (2 * self.n * self.d + self.n + self.d)
