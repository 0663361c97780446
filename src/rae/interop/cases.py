"""One function per kind of reference case: the case's inputs -> our results, by the names of its expected outputs.

They call what a user would call; weights come through `official.py`. `verify.py` measures the results.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from rae.autoencoder.decoder import position_table
from rae.autoencoder.latents import LatentStats, add_noise, draw_sigma, standardise, tokens_to_map
from rae.data.images import center_crop
from rae.diffusion.dit import rotary_angles, sincos_table
from rae.diffusion.flow import Flow, interpolate, shift_factor
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.sampling import dopri5, euler, euler_maruyama, heun, heun_sde, last_step, time_grid
from rae.evaluation.frechet import Moments, frechet_distance
from rae.evaluation.reconstruction import psnr
from rae.interop import training_cases
from rae.interop.fixtures import Case, FixtureError, untrained_encoder
from rae.interop.official import running_statistics

Results = dict[str, Tensor]
UNSHIFTED = Flow(shift=1.0)  # for cases about the network alone


def find_case(kind: str) -> Callable[[Case], Results]:
    """The function for a kind of case. Variants carry a suffix: "ditdh_qknorm" is a "ditdh".

    Raises:
        FixtureError: an unknown kind.
    """
    fitting = [known for known in CASES if kind == known or kind.startswith(f"{known}_")]
    if not fitting:
        raise FixtureError(f"unknown case {kind!r}; known are {', '.join(CASES)}, and variants of them (dit_...).")
    return CASES[max(fitting, key=len)]


# --- autoencoder -----------------------------------------------------------------------------------------------------


def encoder(case: Case) -> Results:
    results = {}
    for suffix in ("", "_same_size"):
        images = case.inputs[f"images{suffix}"]
        model = case.encoder(images)
        results |= {
            f"model_input{suffix}": model.preprocess(images),
            f"tokens{suffix}": model(images),
            f"latents_unnormalized{suffix}": case.autoencoder(model).encode(images),
            f"latents{suffix}": case.autoencoder(model, stats=case.latent_statistics).encode(images),
        }
    return results


def encode_noised(case: Case) -> Results:
    model = case.encoder(case.inputs["images"])
    tokens = model(case.inputs["images"])
    sigma = draw_sigma("uniform", case.hyper["noise_tau"], case.inputs["uniform_draw"].flatten())
    noised = tokens_to_map(add_noise(tokens, sigma, case.inputs["normal_draw"]), model.grid)
    eps = case.hyper["latent_normalization_eps"]
    return {"tokens": tokens, "latents": standardise(noised, *case.latent_statistics, eps)}


def decoder(case: Case) -> Results:
    model, tokens = case.decoder(), case.inputs["latent_tokens"]
    grid = (int(case.hyper["num_latent_tokens"] ** 0.5),) * 2
    return {"logits": model.patches(tokens, grid), "image": model(tokens, grid)}


def rae_decode(case: Case) -> Results:
    z, model = case.inputs["latents"], case.decoder()

    def decode(mean: list[float], std: list[float]) -> Tensor:
        encoder = untrained_encoder(z.shape[1:], mean, std)
        return case.autoencoder(encoder, model, case.latent_statistics).decode(z)

    return {
        "image": decode(case.hyper["image_mean"], case.hyper["image_std"]),
        "image_mean_std_half": decode([0.5] * 3, [0.5] * 3),
    }


def latent_stats(case: Case) -> Results:
    batches, momentum = case.inputs["batches"], case.hyper["momentum"]
    exact = LatentStats(batches.shape[2:])
    for batch in batches:
        exact.update(batch)
    results = {"exact_mean": exact.mean, "exact_var": exact.var}
    # not what we compute statistics with, but what the published ones are
    for name, processes in (("running", [batches]), ("synced", [batches, case.inputs["batches_rank1"]])):
        results[f"{name}_mean"], results[f"{name}_var"] = running_statistics(processes, momentum)
    return results


def position_tables(case: Case) -> Results:
    grid = (case.hyper["grid"],) * 2
    angles = rotary_angles(grid, case.hyper["rope_head_dim"]).repeat_interleave(2, dim=1)
    return {
        "sincos_dit": sincos_table(grid, case.hyper["dim"]),
        "sincos_decoder": position_table(case.hyper["dim"], grid),
        "rope_cos": angles.cos(),
        "rope_sin": angles.sin(),
    }


# --- diffusion -------------------------------------------------------------------------------------------------------


def network(case: Case) -> Results:
    net = case.diffusion_model(case.hyper, UNSHIFTED).network
    x, t, y = (case.inputs[key] for key in "xty")
    seen = {}
    net.blocks[0].register_forward_hook(lambda _, __, out: seen.update(block0=out))
    if "encoder_condition" in case.expected:
        if net.head_condition is not None:
            net.head_condition.register_forward_pre_hook(lambda _, args: seen.update(encoder_condition=args[0]))
        else:  # equal widths: the head's blocks take the condition as it is
            net.head_blocks[0].register_forward_pre_hook(lambda _, args: seen.update(encoder_condition=args[1]))
    velocity = net(x, t, y)
    return {"velocity": velocity, "time_embedding": net.time(t), "label_embedding": net.labels(y), **seen}


def cfg(case: Case) -> Results:
    model = case.diffusion_model(case.hyper, UNSHIFTED)
    x, y, null = case.inputs["x"], case.inputs["y"], torch.full_like(case.inputs["y"], model.null_label)
    rows = _runs(case)
    return {
        "guided": torch.stack([CFG(scale, *interval).wrap(model)(x, t, y) for t, scale, interval in rows]),
        "conditional": torch.stack([model(x, t, y) for t, _, _ in rows]),
        "unconditional": torch.stack([model(x, t, null) for t, _, _ in rows]),
    }


def autoguidance(case: Case) -> Results:
    main = case.diffusion_model(case.hyper["main_model"], UNSHIFTED)
    weak = case.diffusion_model(case.hyper["guidance_model"], UNSHIFTED, "weights_guidance")
    x, y = case.inputs["x"], case.inputs["y"]
    rows = _runs(case)
    return {
        "guided": torch.stack([AutoGuidance(weak, scale, *span).wrap(main)(x, t, y) for t, scale, span in rows]),
        "main": torch.stack([main(x, t, y) for t, _, _ in rows]),
        "guide": torch.stack([weak(x, t, y) for t, _, _ in rows]),
    }


def transport(case: Case) -> Results:
    x, noise, t, u = (case.inputs[key] for key in ("x1", "noise", "t", "uniform_draws"))
    shifts = [shift_factor(*pair) for pair in case.hyper["shift_dim_base_pairs"]]

    def times(**law) -> Tensor:
        return torch.stack([Flow(shift=shift, t_max=case.hyper["t_high"], **law).times(u) for shift in shifts])

    def grids(points: str, last: float) -> Tensor:
        return torch.stack([time_grid(int(points), shift, last=last) for shift in shifts])

    # at a prediction of 0 the loss's gradient is -2 / (C h w) times its target
    prediction = torch.zeros_like(x, requires_grad=True)
    UNSHIFTED.loss(lambda *_: prediction, x, t, t, noise).sum().backward()
    results = {
        "xt": interpolate(x, noise, t),
        "velocity_target": prediction.grad * (-x[0].numel() / 2),
        "shift_values": torch.tensor(shifts),
        "uniform_t_shifted": times(),
        "logit_normal_t_shifted": times(time_law="logit-normal"),
        "logit_normal_m05_08_t_shifted": times(time_law="logit-normal", logit_mean=-0.5, logit_std=0.8),
    }
    for name in case.expected:
        if match := re.fullmatch(r"(ode|sde)_grid_(\d+)", name):
            last = 1 - case.hyper["t_high"] if match[1] == "ode" else case.hyper["sde_last_step_size"]
            results[name] = grids(match[2], last)
    return results


def sample_ode(case: Case) -> Results:
    hyper, (x, y) = case.hyper, (case.inputs["noise"], case.inputs["y"])
    flow = Flow(shift=case.shift)
    main = case.diffusion_model(hyper["main_model"], flow)
    weak = case.diffusion_model(hyper["guidance_model"], flow, "weights_guidance")
    guided, autoguided = CFG(**hyper["cfg"]).wrap(main), AutoGuidance(weak, **hyper["autoguidance"]).wrap(main)
    runs = {
        "grid": lambda times: times,
        "euler": lambda times: euler(main, x, y, times),
        "heun2_": lambda times: heun(main, x, y, times),
        "dopri5_": lambda times: dopri5(main, x, y, times, rtol=hyper["rtol"], atol=hyper["atol"]),
        "dopri5_tight_": lambda t: dopri5(main, x, y, t, rtol=hyper["tight_rtol"], atol=hyper["tight_atol"]),
        "cfg": lambda times: euler(guided, x, y, times),
        "autoguidance": lambda times: euler(autoguided, x, y, times),
    }
    results = {}
    for name in case.expected:
        run, points, final = re.fullmatch(r"(.*?)(\d+)(_final)?", name).groups()
        states = torch.stack(list(runs[run](time_grid(int(points), flow.shift))))
        results[name] = states[-1] if final else states
    return results


def sample_sde(case: Case) -> Results:
    hyper, (x, y, noise) = case.hyper, (case.inputs[key] for key in ("start", "y", "noise"))
    model = case.diffusion_model(hyper["model"], Flow(shift=case.shift))
    samplers = {"euler": euler_maruyama, "heun": heun_sde}
    results = {}
    for name in case.expected:
        # their last step is taken at the unshifted time, though the state lives at the shifted one
        end = 0.0 if name.endswith("none") or name == "grid_no_last_step" else hyper["last_step_size"]
        times = time_grid(hyper["num_steps"], model.flow.shift, last=end)
        if name.startswith("grid"):
            results[name] = times
            continue
        method, form, kind = name.split("_")
        _start, *states = samplers[method](model, x, y, times, iter(noise), form=form)
        results[name] = torch.stack([*states, last_step(model, states[-1], y, end, kind, form)])
    return results


# --- images and evaluation -------------------------------------------------------------------------------------------


def crop(case: Case) -> Results:
    size = (case.hyper["target"],) * 2
    return {
        name.replace("in", "out"): torch.tensor(center_crop(image.numpy(), size)) for name, image in case.inputs.items()
    }


def metrics(case: Case) -> Results:
    # 8-bit images [B,H,W,3] -> [B,3,H,W] in [0,1]
    a, b = (case.inputs[key].permute(0, 3, 1, 2) / 255 for key in "ab")
    moments = []
    for key in ("features1", "features2"):
        moments.append(Moments(case.inputs[key].shape[1]))
        moments[-1].update(case.inputs[key])
    distance = frechet_distance(*(value for m in moments for value in (m.mean, m.covariance)))
    return {"psnr": psnr(a, b).mean()[None], "frechet": torch.tensor([distance])}


CASES: dict[str, Callable[[Case], Results]] = {
    "encoder": encoder,
    "encode_noised": encode_noised,
    "decoder": decoder,
    "rae_decode": rae_decode,
    "latent_stats": latent_stats,
    "position_tables": position_tables,
    "dit": network,
    "ditdh": network,
    "cfg": cfg,
    "autoguidance": autoguidance,
    "transport": transport,
    "sample_ode": sample_ode,
    "sample_sde": sample_sde,
    "training_loss": training_cases.training_loss,
    "schedules": training_cases.schedules,
    "training_steps": training_cases.training_steps,
    "center_crop": crop,
    "metrics": metrics,
    "adaptive_weight": training_cases.adaptive,
    "diffaug": training_cases.augmentation,
    "discriminator": training_cases.discriminator,
    "gan_losses": training_cases.gan_losses,
    "lpips": training_cases.lpips,
}


# --- what several cases share ----------------------------------------------------------------------------------------


def _runs(case: Case) -> list[tuple[Tensor, float, list[float]]]:
    """Rows of a guidance case: times [B], scale, interval."""
    return list(zip(case.inputs["t_rows"], case.hyper["scales"], case.hyper["intervals"]))
