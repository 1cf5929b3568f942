"""Layers on flax.nnx that honour held experts."""

from fedmoe_jax.experts import SlotState as SlotState
from fedmoe_jax.nn.attention import Attention as Attention
from fedmoe_jax.nn.linear import Conv as Conv
from fedmoe_jax.nn.linear import GroupNorm as GroupNorm
from fedmoe_jax.nn.linear import Linear as Linear
from fedmoe_jax.nn.linear import RMSNorm as RMSNorm
from fedmoe_jax.nn.linear import as_float as as_float
from fedmoe_jax.nn.moe import MoE as MoE
