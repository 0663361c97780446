"""Reference cases about training: the flow's loss, optimisation, stage 1's adversarial parts."""

import torch
from torch import Tensor, nn

from rae.diffusion.flow import Flow, interpolate
from rae.diffusion.guidance import drop_labels
from rae.evaluation.lpips import LPIPS
from rae.interop.fixtures import Case
from rae.training.adversarial import adaptive_weight, discriminator_loss, generator_loss, round_to_8_bits
from rae.training.diffaug import diffaug
from rae.training.optim import OptimConfig, build_optimizers, lr_factor, make_ema, set_lr, update_ema

Results = dict[str, Tensor]

# --- stage 2 ---------------------------------------------------------------------------------------------------------


def training_loss(case: Case) -> Results:
    flow = _training_flow(case)
    model = case.diffusion_model(case.hyper["model"], flow).requires_grad_(True)
    x, noise = case.inputs["x1"], case.inputs["noise"]
    t = flow.times(case.inputs["u_t"])
    y = drop_labels(
        case.inputs["y"], case.inputs["u_label"], case.hyper["model"]["class_dropout_prob"], model.null_label
    )
    losses = flow.loss(model.predict, x, y, t, noise)
    losses.mean().backward()
    net = model.network
    return {
        "t": t,
        "prediction": model.predict(interpolate(x, noise, t), t, y),
        "loss_per_sample": losses,
        "loss": losses.mean()[None],
        "grad_norm": nn.utils.get_total_norm([p.grad for p in net.parameters()])[None],
        "grad_t_embedder_W": net.time.frequencies.grad,
        "grad_pos_embed": net.position.grad[None],
        "grad_label_table": net.labels.weight.grad,
        "grad_qkv0": net.blocks[0].attn.qkv.weight.grad,
        "grad_final": net.final.linear.weight.grad,
    }


def schedules(case: Case) -> Results:
    results = {}
    for name, settings in case.hyper["schedules"].items():
        rates = [settings["base_lr"] * _lr_factor(step, settings, case.hyper) for step in case.hyper["steps"]]
        results[f"lr_{name}"] = torch.tensor(rates)
    average, online = (nn.Linear(len(case.inputs["ema_start"]), 1, bias=False) for _ in range(2))
    nn.utils.vector_to_parameters(case.inputs["ema_start"], average.parameters())
    history = []
    for values in case.inputs["params"]:
        nn.utils.vector_to_parameters(values, online.parameters())
        update_ema(average, online, case.hyper["ema_decay"])
        history.append(average.weight[0].detach().clone())
    return {**results, "ema_after": torch.stack(history)}


def training_steps(case: Case) -> Results:
    hyper, flow = case.hyper, _training_flow(case)
    model = case.diffusion_model(hyper["model"], flow).requires_grad_(True)
    net, ema = model.network, make_ema(model.network)
    settings = hyper["optimizer"]
    config = OptimConfig(lr=settings["lr"], betas=settings["betas"], weight_decay=settings["weight_decay"], ema=0)
    optimizers = build_optimizers(config, net.parameter_groups())
    losses, norms, rates = [], [], []
    for step in range(hyper["steps"]):
        x, y, noise, u_t, u_label = (case.inputs[key][step] for key in ("x1", "y", "noise", "u_t", "u_label"))
        y = drop_labels(y, u_label, hyper["model"]["class_dropout_prob"], model.null_label)
        rates.append(settings["lr"] * _lr_factor(step, hyper["scheduler"], hyper))
        set_lr(optimizers, rates[-1])
        net.zero_grad()
        loss = flow.loss(model.predict, x, y, flow.times(u_t), noise).mean()
        loss.backward()
        losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), hyper["clip_grad"]))
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, net, hyper["ema_decay"])
    return {
        "losses": torch.stack(losses),
        "grad_norms": torch.stack(norms),
        "lrs": torch.tensor(rates),
        "final_qkv0": net.blocks[0].attn.qkv.weight,
        "ema_qkv0": ema.blocks[0].attn.qkv.weight,
        "final_W": net.time.frequencies,
        "final_pos_embed": net.position[None],
        "final_final": net.final.linear.weight,
        "ema_final": ema.final.linear.weight,
    }


def _training_flow(case: Case) -> Flow:
    hyper = case.hyper
    return Flow(
        shift=case.shift,
        time_law=hyper["t_distribution"],
        logit_mean=hyper["t_mean"],
        logit_std=hyper["t_std"],
    )


def _lr_factor(step: int, settings: dict, hyper: dict) -> float:
    """`lr_factor` with their settings, which count in steps or in epochs."""
    warmup, decay_end = (
        settings[f"{name}_steps"] if f"{name}_steps" in settings else int(settings[epochs] * hyper["steps_per_epoch"])
        for name, epochs in (("warmup", "warmup_epochs"), ("decay_end", "decay_end_epoch"))
    )
    return lr_factor(
        step,
        schedule=settings["type"],
        warmup=warmup,
        decay_end=decay_end,
        final=settings["final_lr"] / settings["base_lr"],
        warmup_from_zero=settings["warmup_from_zero"],
    )


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def adaptive(case: Case) -> Results:
    x, target, v = (case.inputs[key] for key in ("x", "target", "v"))
    weight, limit = case.weights()["W"].requires_grad_(), case.hyper["max_weight"]
    h = x @ weight.T
    (of_reconstruction,) = torch.autograd.grad((h - target).abs().mean(), weight, retain_graph=True)
    (unscaled,) = torch.autograd.grad(-(h * v).mean(), weight)
    reconstruction = of_reconstruction.norm()[None]
    gan = torch.stack([(unscaled * scale).norm() for scale in case.hyper["gan_scale"]])
    return {
        "lambda": adaptive_weight(reconstruction, gan, limit=limit),
        "recon_grad_norm": reconstruction,
        "gan_grad_norm": gan,
    }


def augmentation(case: Case) -> Results:
    images, draws = case.inputs["images"], case.inputs["rand01"].flatten(1)
    gates = tuple((case.inputs["gate_draws_prob05"] <= 0.5).tolist())
    return {
        "out_cutout0": diffaug(images, draws),
        "out_cutout02": diffaug(images, draws, cutout=0.2),
        "out_prob05": diffaug(images, draws, cutout=0.2, gates=gates),
    }


def gan_losses(case: Case) -> Results:
    real, fake = case.inputs["logits_real"], case.inputs["logits_fake"].requires_grad_()
    generator = generator_loss(fake).mean()
    hinge, vanilla = (discriminator_loss(kind, real, fake).mean() for kind in ("hinge", "vanilla"))
    return {
        "hinge_d": hinge[None],
        "hinge_d_sum": hinge[None] * real.numel(),
        "vanilla_d": vanilla[None],
        "vanilla_g": generator[None],
        "vanilla_g_sum": generator[None] * fake.numel(),
        "grad_vanilla_g": torch.autograd.grad(generator, fake)[0],
        "fake_quantized": round_to_8_bits(case.inputs["reconstruction"]),
        # what they do; ours rounds (`to_bytes`)
        "uint8": case.inputs["image"].clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1),
    }


def lpips(case: Case) -> Results:
    model = LPIPS(tuple(case.hyper["vgg_channels"]))
    model.load_published(case.weights())
    x, y = case.inputs["input"], case.inputs["target"].requires_grad_()
    distance, taps = model(x, y), model.features(x)
    return {
        "per_image": distance.view(-1, 1, 1, 1),
        "mean": distance.mean()[None],
        "grad_target": torch.autograd.grad(distance.mean(), y)[0],
        "tap0": taps[0],
        "tap4": taps[4],
    }


def discriminator(case: Case) -> Results:
    model = case.discriminator()
    images = case.inputs["images"]
    last, first, *_ = model.features(images)
    results = {
        "logits_eval": model(images),
        "logits_eval_nonsquare": model(case.inputs["images_nonsquare"]),
        "feature_last": last,
        "feature_key0": first,
    }
    model.iterate()
    results["logits_train"] = model(images)
    first_head, second_head = model.heads[:2]
    results["u_after_train.heads.0.0.0"] = first_head.conv1.u
    results["v_after_train.heads.0.0.0"] = first_head.conv1.v
    results["u_after_train.heads.1.1.fn.0"] = second_head.conv2.u
    return results
