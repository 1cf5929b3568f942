"""The two networks of the workload in PyTorch, for simulators that take a module."""

import torch
import workload
from torch import nn


class Network(nn.Sequential):
    """x [example, 28, 28] to [example, class]."""

    def __init__(self, model):
        if model == "mlp":
            super().__init__(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, workload.CLASSES))
        else:
            first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
            convolutions = [layer for each in (first, second) for layer in (each, nn.ReLU(), nn.MaxPool2d(2))]
            super().__init__(nn.Unflatten(1, (1, 28)), *convolutions, nn.Flatten(), nn.Linear(7 * 7 * 32, workload.CLASSES))

    def loss(self, x, y):
        """Mean cross-entropy."""
        return nn.functional.cross_entropy(self(x), y)


def initial(model):
    """The network with the workload's initial weights."""
    network, given = Network(model), workload.weights(model)
    if model == "cnn":  # flattened here as [channel, row, column]
        given["out"] = given["out"].reshape(7, 7, 32, -1).transpose(2, 0, 1, 3).reshape(7 * 7 * 32, -1)
    layers = [layer for layer in network if hasattr(layer, "weight")]
    kernels = [name for name in given if not name.endswith("_bias")]
    with torch.no_grad():
        for layer, name in zip(layers, kernels, strict=True):
            layer.weight.copy_(torch.from_numpy(given[name]).movedim((-1, -2), (0, 1)))
            layer.bias.copy_(torch.from_numpy(given[f"{name}_bias"]))
    return network


def loss(network, x, y):
    """What `network` loses on arrays."""
    with torch.no_grad():
        return network.loss(torch.from_numpy(x), torch.from_numpy(y).long())
