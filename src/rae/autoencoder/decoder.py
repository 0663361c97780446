"""Tokens => images: the ViT decoder of a representation autoencoder (arXiv 2510.11690, Sec. 3 and App. C).

tokens [B,N,C] => embedding [B,N,W] => class token + positions, transformer [B,1+N,W] => patches [B,N,p*p*3]
=> images [B,3,H,W]
"""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.autoencoder.latents import map_to_tokens, tokens_to_map
from rae.config import Config

# Width, depth, heads, MLP width. B, L and XL are the paper's (Sec. 3, Table 1b); the others are for CPUs.
DECODERS = {
    "ViT-Ti": (192, 12, 3, 768),
    "ViT-S": (384, 12, 6, 1536),
    "ViT-B": (768, 12, 12, 3072),
    "ViT-L": (1024, 24, 16, 4096),
    "ViT-XL": (1152, 28, 16, 4096),
}


class DecoderConfig(Config):
    """Shape of a decoder.

    Args:
        latent_channels: C, channels of a token: the encoder's width.
        width, depth, heads, mlp_width: of the transformer; `DecoderConfig.of_size` takes them from `DECODERS`.
        patch_size: p, pixels per side that a token becomes; twice the encoder's gives twice the resolution (Sec. 6.1).
        grid: (h, w) of the decoder's tokens; images are (h*p, w*p).
        norm_eps: eps of every LayerNorm.
    """

    latent_channels: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_width: PositiveInt
    patch_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]
    norm_eps: PositiveFloat = 1e-12

    @model_validator(mode="after")
    def _divisible(self) -> "DecoderConfig":
        if self.width % self.heads:
            raise ValueError(
                f"decoder width {self.width} is not a multiple of its {self.heads} heads; change one of them."
            )
        if self.width % 4:
            raise ValueError(f"decoder width {self.width} is not a multiple of 4, which sin-cos positions need.")
        return self

    @classmethod
    def of_size(cls, size: str, *, latent_channels: int, patch_size: int, grid: tuple[int, int]) -> "DecoderConfig":
        """The configuration of a named size, a key of `DECODERS`.

        Raises:
            ValueError: no such size.
        """
        if size not in DECODERS:
            raise ValueError(f"no decoder size {size!r}; there are {', '.join(DECODERS)}.")
        width, depth, heads, mlp_width = DECODERS[size]
        return cls(
            latent_channels=latent_channels,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp_width,
            patch_size=patch_size,
            grid=grid,
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W) of the decoded images, in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size


# ----------------------------------------------------------------------------------------------------------------------
# Patches and positions


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Inverse of `unpatchify`: images [B,3,h*p,w*p] -> patches [B,h*w,p*p*3]."""
    batch, channels, height, width = images.shape
    grid = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, grid[0], patch_size, grid[1], patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], patch_size * patch_size * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Lay patches side by side: [B,h*w,p*p*3] -> images [B,3,h*p,w*p].

    Args:
        patches: tokens row-major over the grid; in a token: row in the patch, column in the patch, channel.
        grid: (h, w) in patches.
        patch_size: p, in pixels.
    """
    batch, _, features = patches.shape
    channels = features // patch_size**2
    x = patches.reshape(batch, *grid, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid[0] * patch_size, grid[1] * patch_size)


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """[sin(k*f), cos(k*f)], f = 10000^(-j / (W/4)), j < W/4: first half of the features: columns, second: rows.

    Args:
        width: W, features per token, a multiple of 4.
        grid: (h, w) in tokens.

    Returns:
        [1 + h*w, W] in float32, computed in float64; row 0, the class token's, is zero.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    halves = [k.flatten().outer(frequencies) for k in (columns, rows)]
    table = torch.cat([wave for half in halves for wave in (half.sin(), half.cos())], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()


# ----------------------------------------------------------------------------------------------------------------------
# Network. Parameters, normalisation and the residual stream are float32; the branches compute in `dtype`.


class Linear(nn.Linear):
    """x W^T + b in the type of x; the float32 parameters are cast here, at the call, and nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + MLP(norm2(x)) with the exact (erf) GELU and biases everywhere."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = Linear(width, 3 * width)  # query, key, value
        self.out = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.up = Linear(width, config.mlp_width)
        self.down = Linear(config.mlp_width, width)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # [B,L,W] -> three times [B,heads,L,W/heads]
        qkv = self.qkv(self.norm1(x).to(dtype)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x).to(dtype))))


class Decoder(nn.Module):
    """Tokens -> images in the encoder's normalised units (`RAE` multiplies by the encoder's std and adds its mean).

    Parameters (what a key table for foreign checkpoints maps to): `embed`, `cls_token` [1,1,W], `positions` [1,1+N,W],
    `blocks.{i}.{norm1,qkv,out,norm2,up,down}`, `norm`, `head`. Linear layers start as torch makes them, the class token
    at zero and the positions at sin-cos, all as in the authors' code; positions are a parameter, so a checkpoint's own
    table is used, whatever became of it in training.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Linear(config.latent_channels, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(position_table(config.width, config.grid)[None])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, config.patch_size**2 * 3)

    @torch.no_grad()
    def start_from(self, other: "Decoder") -> list[str]:
        """Take over another decoder's weights, for another domain, encoder or resolution.

        The blocks must be of the same shape. The embedding fits another encoder only if that has as many channels, the
        last layer only patches of the same size; where they do not fit they stay as they were initialised. Positions
        are resized bicubically to this grid.

        Returns:
            What was not taken over as it is, in words.

        Raises:
            ValueError: another width, depth, number of heads or MLP width.
        """
        mine, theirs = self.config, other.config
        for name in ("width", "depth", "heads", "mlp_width", "norm_eps"):
            if getattr(mine, name) != getattr(theirs, name):
                size = f"[{theirs.width},{theirs.depth},{theirs.heads},{theirs.mlp_width}]"
                remedy = "convert it with our own" if name == "norm_eps" else f"take decoder.size={size}"
                wanted, found = getattr(mine, name), getattr(theirs, name)
                raise ValueError(f"a decoder of {name} {wanted} cannot start from one of {found}; {remedy}.")
        state, said = other.state_dict(), []
        if mine.latent_channels != theirs.latent_channels:
            said.append(f"the embedding begins anew: {theirs.latent_channels} -> {mine.latent_channels} channels")
        if mine.patch_size != theirs.patch_size:
            said.append(f"the last layer begins anew: patches of {theirs.patch_size} -> {mine.patch_size} pixels")
        if mine.grid != theirs.grid:
            table = tokens_to_map(other.positions[:, 1:], theirs.grid)
            table = map_to_tokens(F.interpolate(table, mine.grid, mode="bicubic", align_corners=False))
            state["positions"] = torch.cat([other.positions[:, :1], table], dim=1)
            said.append(f"positions are resized: {theirs.grid} -> {mine.grid} tokens")
        fitting = {name: value for name, value in state.items() if value.shape == self.state_dict()[name].shape}
        self.load_state_dict(self.state_dict() | fitting)
        return said

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decode.

        Args:
            tokens: [B,N,C], row-major, not standardised.
            grid: (h, w) of these tokens if it is not the decoder's: they are then resized to it, bilinearly, after the
                linear embedding. None: N must be the decoder's own number of tokens.
            dtype: what attention and linear layers compute in; the result is float32.
            recompute: keep no activations inside blocks, compute them again in the backward pass.
            hidden: return what the last layer is applied to as well.

        Returns:
            Images [B,3,H,W], float32; with `hidden` also its input [B,N,W], in `dtype`, detached.

        Raises:
            ValueError: tokens of the wrong shape.
        """
        features = self.features(tokens, grid, dtype=dtype, recompute=recompute)
        images = unpatchify(self.head(features).float(), self.config.grid, self.config.patch_size)
        return (images, features.detach()) if hidden else images

    def patches(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The prediction per token, before it is laid out as an image: [B,N,p*p*3]. Arguments as in `forward`."""
        return self.head(self.features(tokens, grid, dtype=torch.float32, recompute=False))

    def features(self, tokens: Tensor, grid: tuple[int, int] | None, *, dtype: torch.dtype, recompute: bool) -> Tensor:
        """What the last layer, `head`, is applied to: [B,N,W] in `dtype`. Arguments as in `forward`."""
        config = self.config
        grid = tuple(grid or config.grid)
        if tokens.ndim != 3 or tokens.shape[1:] != (grid[0] * grid[1], config.latent_channels):
            raise ValueError(
                f"tokens of shape {list(tokens.shape)} given to a decoder of [B, {grid[0]}*{grid[1]}, "
                f"{config.latent_channels}]; pass grid=(h, w) if the tokens lie on another grid."
            )
        x = self.embed(tokens.to(dtype)).float()
        if grid != config.grid:
            x = map_to_tokens(F.interpolate(tokens_to_map(x, grid), config.grid, mode="bilinear", align_corners=False))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, dtype, use_reentrant=False) if recompute else block(x, dtype)
        return self.norm(x[:, 1:]).to(dtype)
