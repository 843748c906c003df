"""The schemas of the operators: those of csrc/, which are compared with these when the library is loaded."""

NAMESPACE = "micromix"

EMULATED = 1 << 8
"""Bit of `format` of place_weight, linear and linears on CUDA: the Blackwell kernel in software."""

SCHEMAS = {
    "quantize": (
        "(Tensor x, Tensor? order, int k4, int k6, int k8, int format)"
        " -> (Tensor data, Tensor scales)"
    ),
    "linear": (
        "(Tensor data, Tensor scales, Tensor weight, Tensor? bias, int n,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> Tensor"
    ),
    "linears": (
        "(Tensor data, Tensor scales, Tensor[] weights, Tensor?[] biases, int[] n,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> Tensor[]"
    ),
    "weight_only_linear": (
        "(Tensor x, Tensor? order, Tensor weight, Tensor? bias, int n,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> Tensor"
    ),
    "rms_norm_quantize": (
        "(Tensor x, Tensor? residual, Tensor? weight, float eps, int form, ScalarType dtype,"
        " bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]"
    ),
    "layer_norm_quantize": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype,"
        " bool keep, Tensor?[] orders, int[] layouts) -> Tensor[]"
    ),
    "pointwise_quantize": (
        "(Tensor x, Tensor? other, int function, ScalarType dtype, bool keep,"
        " Tensor?[] orders, int[] layouts) -> Tensor[]"
    ),
    "place_weight": ("(Tensor data, Tensor scales, int k4, int k6, int k8, int format) -> Tensor"),
    "unplace_weight": (
        "(Tensor weight, int n, int k4, int k6, int k8, int format) -> (Tensor data, Tensor scales)"
    ),
}
