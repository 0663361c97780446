"""DiT and DiT-DH: transformers that map noisy latents, a time and a label to a prediction of the same shape.

DiT (arXiv 2510.11690, App. D) is LightningDiT: RMSNorm, SwiGLU, axial rotary embedding plus a position table,
adaLN-zero modulation. DiT-DH (Sec. 5) conditions a shallow, wide head on a DiT, token by token:

    z_t = M(x_t | t, y)        v = H(x_t | z_t, t)

The objective is elsewhere (`flow.py`). Residual streams and norms are float32; matrix products, modulation and gates
are computed in the `dtype` that the caller names.
"""

import math
from typing import Any, Literal, Self

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.config import Config

# name: (width, heads, depth), Table 13
DIT_SIZES = {
    "S": (384, 6, 12),
    "B": (768, 12, 12),
    "L": (1024, 16, 24),
    "XL": (1152, 16, 28),
    "XXL": (1280, 16, 32),
    "H": (1536, 16, 32),
    "G": (2048, 16, 40),
    "T": (2688, 21, 40),
}
HEAD_SIZE = (2048, 16, 2)  # width, heads, depth of DiT-DH's head (Table 16)


# --- configuration ---------------------------------------------------------------------------------------------------


class DiTConfig(Config):
    """A DiT.

    Attributes:
        in_channels: latent channels C.
        grid: (h, w) of the latents, not of the tokens.
        patch_size: latent pixels per side of one token; 1 throughout the paper's latent models.
        width, heads, depth: of the transformer; `DiTConfig.of_size` fills them in from Table 13.
        num_classes: K; labels are 0..K-1 and K is the null label. 0 makes an unconditional model.
        mlp_ratio: the gated MLP has int(2/3 * int(mlp_ratio * width)) hidden units.
        qk_norm: RMS-normalise queries and keys per head.
        allow_narrow: build a model narrower than its tokens although it cannot converge (Theorem 1).
    """

    kind: Literal["dit"] = "dit"
    in_channels: int = pydantic.Field(gt=0)
    grid: tuple[int, int]
    patch_size: int = pydantic.Field(1, gt=0)
    width: int = pydantic.Field(gt=0)
    heads: int = pydantic.Field(gt=0)
    depth: int = pydantic.Field(ge=0)
    num_classes: int = pydantic.Field(ge=0)
    mlp_ratio: float = pydantic.Field(4.0, gt=0)
    qk_norm: bool = False
    allow_narrow: bool = False

    @classmethod
    def of_size(cls, size: str, **settings: Any) -> Self:
        """The configuration of a published size, S to T: `DiTDHConfig.of_size("XL", in_channels=768, ...)`."""
        if size not in DIT_SIZES:
            raise ValueError(f"unknown size {size!r}; the sizes are {', '.join(DIT_SIZES)} (Table 13).")
        width, heads, depth = DIT_SIZES[size]
        return cls(width=width, heads=heads, depth=depth, **settings)

    @property
    def token_dim(self) -> int:
        """n, the numbers in one token: C p^2."""
        return self.in_channels * self.patch_size**2

    @property
    def token_grid(self) -> tuple[int, int]:
        return self.grid[0] // self.patch_size, self.grid[1] // self.patch_size

    @property
    def output_width(self) -> int:
        """Width of the stream that the output is read from: what the width rule is about."""
        return self.width

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if any(side <= 0 or side % self.patch_size for side in self.grid):
            raise ValueError(f"grid {self.grid} is not a multiple of patch_size {self.patch_size}; change either.")
        for name, width, heads in self._streams():
            if width % (4 * heads):
                raise ValueError(
                    f"{name} {width} with {heads} heads: the rotary embedding needs a head dimension "
                    f"(here {width / heads:g}) that is a multiple of 4."
                )
        n, d = self.token_dim, self.output_width
        if d < n and not self.allow_narrow:
            raise ValueError(
                f"a model of width {d} cannot denoise tokens of {n} numbers: its loss stays above the sum of the "
                f"{n - d} smallest eigenvalues of Cov(noise - x), for one image above (n - d) / n = {(n - d) / n:.3f} "
                f"(arXiv 2510.11690, Theorem 1). Use a width of at least {n}, or DiT-DH, whose head alone must be that "
                "wide; allow_narrow=true builds it all the same."
            )
        return self

    def _streams(self) -> list[tuple[str, int, int]]:
        return [("width", self.width, self.heads)]


class DiTDHConfig(DiTConfig):
    """A DiT-DH: the DiT of the inherited fields, and a head of `head_width`, `head_heads`, `head_depth` (Sec. 5)."""

    kind: Literal["dit-dh"] = "dit-dh"
    head_width: int = pydantic.Field(HEAD_SIZE[0], gt=0)
    head_heads: int = pydantic.Field(HEAD_SIZE[1], gt=0)
    head_depth: int = pydantic.Field(HEAD_SIZE[2], ge=0)

    @property
    def output_width(self) -> int:
        return self.head_width

    def _streams(self) -> list[tuple[str, int, int]]:
        return [*super()._streams(), ("head_width", self.head_width, self.head_heads)]


# --- tables and tokens -----------------------------------------------------------------------------------------------


def sincos_table(grid: tuple[int, int], width: int) -> Tensor:
    """Position table [h w, width]: sin, cos of column 10000^(-j/(width/4)) in the first half, of row in the second."""
    frequencies = 10000.0 ** (-_arange(width // 4) / (width // 4))
    row, column = _positions(grid)
    angles = [position[:, None] * frequencies for position in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def rotary_angles(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Angles [h w, head_dim / 2] of the axial rotary embedding: row 10000^(-2j/(head_dim/2)), then column."""
    frequencies = 10000.0 ** (-_arange(head_dim // 4) / (head_dim // 4))
    return torch.cat([position[:, None] * frequencies for position in _positions(grid)], dim=1)


def _positions(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    h, w = grid
    tokens = _arange(h * w)
    return tokens.div(w, rounding_mode="floor"), tokens.remainder(w)


def _arange(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device="cpu")  # not every device has float64


def patchify(x: Tensor, p: int) -> Tensor:
    """[B,C,h,w] -> tokens [B,N,C p p], row-major over the grid; features in the order channel, row, column."""
    if p == 1:
        return x.flatten(2).transpose(1, 2)
    return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, token_grid: tuple[int, int], p: int) -> Tensor:
    """tokens [B,N,p p C] -> [B,C,h,w]; features in the order row, column, channel (not that of `patchify`)."""
    if p == 1:
        return tokens.transpose(1, 2).unflatten(2, token_grid)
    return tokens.unflatten(2, (p, p, -1)).unflatten(1, token_grid).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# --- layers ----------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer with float32 parameters that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight, over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.weight

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift in the dtype of `scale`; the weight is folded into it, which saves a pass."""
        normed = F.rms_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype)
        return torch.addcmul(shift, normed, self.weight.to(scale.dtype) * (1 + scale))


class Attention(nn.Module):
    """Multi-head attention with rotary embedding on queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        # tokens [B,N,W] -> q, k, v [B,N,heads,head_dim]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(z, rotation).to(v.dtype) for z in (q, k))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring pairs as complex numbers, turned: (a + i b) e^(i angle), in float32.

    Args:
        x: [B,N,heads,head_dim].
        rotation: e^(i angle), complex64 [N,1,head_dim/2].
    """
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), (a, b) = w12(x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """A transformer block with adaLN-zero modulation, by one condition per sample ([B,1,W]) or per token ([B,N,W])."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * int(mlp_ratio * width)))
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1.modulated(x, shift1, scale1), rotation)
        return x + gate2 * self.mlp(self.norm2.modulated(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and projection to the numbers of a token."""

    def __init__(self, width: int, token_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.linear = Linear(width, token_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=-1)
        return self.linear(self.norm.modulated(x, shift, scale)).float()


class TimeEmbedding(nn.Module):
    """MLP([sin(2 pi t W), cos(2 pi t W)]), W a vector of 256 frequencies drawn once; t is not scaled by 1000."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(256))  # trained, as in the published checkpoints
        self.mlp = nn.Sequential(Linear(512, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


# --- models ----------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """A diffusion transformer on latent maps.

    Parameters are float32. The position table and the time frequencies start at formulas but are trained, and are
    always read from checkpoints. A fresh model puts out exactly 0.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Linear(config.token_dim, config.width)
        self.position = nn.Parameter(sincos_table(config.token_grid, config.width).to(self.embed.weight.device))
        self.time = TimeEmbedding(config.width)
        self.labels = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = _blocks(config.depth, config.width, config.heads, config)
        self.register_buffer("rotary", self._rotary(config.width // config.heads), persistent=False)
        self._build_output()
        self.init_weights()

    def _build_output(self) -> None:
        self.final = FinalLayer(self.config.width, self.config.token_dim)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class": the last row of the label table."""
        return self.config.num_classes

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place.

        layer                        weight              bias
        linear layers                Xavier uniform      0
        embeddings of the latent     Xavier uniform      0
        time MLP, label table        N(0, 0.02^2)        0
        modulations, output          0                   0
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self._init_ends()

    def _init_ends(self) -> None:
        nn.init.normal_(self.labels.weight, std=0.02)
        nn.init.normal_(self.time.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time.mlp[2].weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
        nn.init.zeros_(self.final.linear.weight)
        nn.init.zeros_(self.final.linear.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, dtype: torch.dtype = torch.float32, recompute: bool = False
    ) -> Tensor:
        """Noisy latents -> prediction.

        Args:
            x: noisy latents [B,C,h,w], float32.
            t: shifted times [B] in [0, 1], float32.
            y: labels [B] in 0..K, int64; K is the null label.
            dtype: of the matrix products: float32 or bfloat16.
            recompute: keep no activations inside blocks, compute them again in the backward pass.

        Returns:
            The prediction [B,C,h,w], float32.
        """
        self._check(x)
        tokens, time = patchify(x, self.config.patch_size).to(dtype), self.time(t)
        c = (time + self.labels(y))[:, None].to(dtype)
        s = self.embed(tokens).float() + self.position
        s = _run(self.blocks, s, c, self.rotary, recompute)
        return unpatchify(self.final(s, c), self.config.token_grid, self.config.patch_size)

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by how they are optimised: "matrices" inside the blocks (for Muon), and all "others"."""
        matrices = [(n, p) for n, p in self.named_parameters() if "blocks." in n and p.ndim == 2]
        chosen = {name for name, _ in matrices}
        return {"matrices": matrices, "others": [(n, p) for n, p in self.named_parameters() if n not in chosen]}

    def _rotary(self, head_dim: int) -> Tensor:
        """(cos, sin) of the rotary angles [N, 1 (head), head_dim/2, 2], real: buffers are cast with their module."""
        angles = rotary_angles(self.config.token_grid, head_dim)[:, None]
        table, device = torch.stack([angles.cos(), angles.sin()], dim=-1).float(), self.embed.weight.device
        return table if device.type == "meta" else table.to(device)  # weights take meta's place, but no file holds this

    def _check(self, x: Tensor) -> None:
        expected = (self.config.in_channels, *self.config.grid)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"latents of shape {tuple(x.shape[1:])} (C, h, w) given to a model built for {expected}; "
                "use the autoencoder it was trained with, or build a model for this shape."
            )


class DiTDH(DiT):
    """A DiT with a wide diffusion head (DiT-DH, Sec. 5): the inherited blocks are M, `head_blocks` are H."""

    config: DiTDHConfig

    def _build_output(self) -> None:
        config = self.config
        self.head_condition = Linear(config.width, config.head_width) if config.width != config.head_width else None
        self.head_embed = Linear(config.token_dim, config.head_width)
        self.head_blocks = _blocks(config.head_depth, config.head_width, config.head_heads, config)
        rotary = self._rotary(config.head_width // config.head_heads)
        self.register_buffer("head_rotary", rotary, persistent=False)
        self.final = FinalLayer(config.head_width, config.token_dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place, as the authors do: unlike DiT's, most linear layers keep torch's default.

        layer                        weight              bias
        linear layers                torch's default     torch's default
        embeddings of the latent     Xavier uniform      0
        time MLP, label table        N(0, 0.02^2)        torch's default
        modulations, output          0                   0
        """
        for embedding in (self.embed, self.head_embed):
            nn.init.xavier_uniform_(embedding.weight)
            nn.init.zeros_(embedding.bias)
        self._init_ends()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, dtype: torch.dtype = torch.float32, recompute: bool = False
    ) -> Tensor:
        """As `DiT.forward`."""
        self._check(x)
        tokens, time = patchify(x, self.config.patch_size).to(dtype), self.time(t)
        # SiLU here, and once more in every modulation: so were the published models trained
        c = F.silu(time + self.labels(y))[:, None].to(dtype)
        s = self.embed(tokens).float() + self.position
        s = _run(self.blocks, s, c, self.rotary, recompute)
        z = F.silu(time[:, None] + s).to(dtype)
        if self.head_condition is not None:
            z = self.head_condition(z)
        h = _run(self.head_blocks, self.head_embed(tokens).float(), z, self.head_rotary, recompute)
        return unpatchify(self.final(h, z), self.config.token_grid, self.config.patch_size)


def build(config: DiTConfig) -> DiT:
    """The network of a configuration."""
    return DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)


def _blocks(depth: int, width: int, heads: int, config: DiTConfig) -> nn.ModuleList:
    return nn.ModuleList([Block(width, heads, config.mlp_ratio, config.qk_norm) for _ in range(depth)])


def _run(blocks: nn.ModuleList, x: Tensor, c: Tensor, rotary: Tensor, recompute: bool) -> Tensor:
    rotation = torch.view_as_complex(rotary)
    for block in blocks:
        x = checkpoint(block, x, c, rotation, use_reentrant=False) if recompute else block(x, c, rotation)
    return x
