"""Names of the delta kinds, for those who must not import torch to know them."""

from __future__ import annotations

LOW_RANK = "LowRank"
SPARSE = "Sparse"
COLUMNS = "Columns"
ROWS = "Rows"
ONE_BIT = "OneBit"
KRONECKER = "Kronecker"
CIRCULANT = "Circulant"
TOP_K = "TopK"
DENSE = "Dense"
SCALE = "Scale"
ROTATE = "Rotate"
BIAS = "Bias"
NORM_WEIGHT = "NormWeight"
TOKEN_ROWS = "TokenRows"
PREFIX = "Prefix"
PROMPT = "Prompt"
INVOCATION = "Invocation"

KINDS = (
    LOW_RANK, SPARSE, COLUMNS, ROWS, ONE_BIT, KRONECKER, CIRCULANT, TOP_K, SCALE, ROTATE, BIAS,
    NORM_WEIGHT, TOKEN_ROWS, PREFIX, PROMPT, INVOCATION, DENSE,
)  # fmt: skip

# Kinds whose sum is defined: that of `y += dW x` is the sum of the matrices, that of `y += c` the
# sum of the vectors.
ADDABLE = frozenset(
    {LOW_RANK, SPARSE, COLUMNS, ROWS, ONE_BIT, KRONECKER, CIRCULANT, BIAS, DENSE}
)  # fmt: skip

# Kinds that are read, so that they can be converted, and not served.
NOT_SERVED = frozenset({DENSE})
