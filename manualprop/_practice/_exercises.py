"""The exercises, in the order that builds."""

from manualprop._practice._activations import LINEAR, RELU, SIGMOID, SOFTPLUS, TANH, TANH_OUTPUT
from manualprop._practice._exercise import Exercise
from manualprop._practice._images import CONVOLUTION, MAX_POOL
from manualprop._practice._layers import BATCH_NORM, DROPOUT, EMBEDDING, GELU_MLP, LAYER_NORM
from manualprop._practice._losses import CROSS_ENTROPY, MOMENTUM_EXERCISE, MSE, NETWORK, SOFTMAX

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        LINEAR,
        SIGMOID,
        TANH,
        RELU,
        SOFTPLUS,
        MSE,
        SOFTMAX,
        CROSS_ENTROPY,
        NETWORK,
        MOMENTUM_EXERCISE,
        DROPOUT,
        BATCH_NORM,
        LAYER_NORM,
        EMBEDDING,
        CONVOLUTION,
        MAX_POOL,
        TANH_OUTPUT,
        GELU_MLP,
    )
}
