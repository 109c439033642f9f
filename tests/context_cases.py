"""Small context models whose contexts, means and scales are all at work, for the tests of them."""

import importlib

from common.coding import entropy, exact

import torch

PAPERS = ("joint_ar", "checkerboard")
MODELS = {paper: importlib.import_module(f"{paper}.model") for paper in PAPERS}


def lively(model, seed=0):
    """Weights with which latents, contexts, means and scales are all at work; tables ready."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like):
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        model.g_a[6].weight.mul_(60)
        model.h_a[4].weight.mul_(40)
        for layer in (model.context_prediction, *model.entropy_parameters):
            if hasattr(layer, "weight"):
                fan_in = layer.weight[0].numel() * (0.5 if hasattr(layer, "mask") else 1)
                layer.weight.copy_(noise(layer.weight) * (1.5 / fan_in) ** 0.5)
                layer.bias.copy_(0.3 * noise(layer.bias))
        model.entropy_parameters[-1].bias[: model.M] += 2  # scales
    model.update(force=True)
    return model.eval()


def build(paper, N=8, M=12, **options):
    torch.manual_seed(0)
    return lively(MODELS[paper].build(N=N, M=M, **options))


def latents(model, height, width, batch=1, seed=0):
    """y (B, M, h, w) and exact hyper parameters (B, 2M, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    y = 6 * torch.randn(batch, model.M, height, width, generator=generator)
    z = 3 * torch.randn(batch, model.N, -(-height // 4), -(-width // 4), generator=generator)
    params = exact.run(model.h_s, entropy.dequantize(model.entropy_bottleneck, z))
    return y, params[..., :height, :width]
