"""The schemas of the operators: those of csrc/, which are compared with these when the library is loaded.

None has a list: Inductor's C++ wrapper calls an operator without Python only if all it takes and returns are tensors,
numbers and None.
"""

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
    "linears.two": (
        "(Tensor data, Tensor scales, Tensor weight0, Tensor? bias0, int n0,"
        " Tensor weight1, Tensor? bias1, int n1,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "linears.three": (
        "(Tensor data, Tensor scales, Tensor weight0, Tensor? bias0, int n0,"
        " Tensor weight1, Tensor? bias1, int n1, Tensor weight2, Tensor? bias2, int n2,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
    "weight_only_linear": (
        "(Tensor x, Tensor? order, Tensor weight, Tensor? bias, int n,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> Tensor"
    ),
    "weight_only_linears.two": (
        "(Tensor x, Tensor? order, Tensor weight0, Tensor? bias0, int n0,"
        " Tensor weight1, Tensor? bias1, int n1,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "weight_only_linears.three": (
        "(Tensor x, Tensor? order, Tensor weight0, Tensor? bias0, int n0,"
        " Tensor weight1, Tensor? bias1, int n1, Tensor weight2, Tensor? bias2, int n2,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
    "rms_norm_quantize": (
        "(Tensor x, Tensor? residual, Tensor? weight, float eps, int form, ScalarType dtype,"
        " bool keep, Tensor? order, int k4, int k6, int k8, int format)"
        " -> (Tensor sum, Tensor y, Tensor data, Tensor scales)"
    ),
    "layer_norm_quantize": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype,"
        " bool keep, Tensor? order, int k4, int k6, int k8, int format)"
        " -> (Tensor sum, Tensor y, Tensor data, Tensor scales)"
    ),
    "pointwise_quantize": (
        "(Tensor x, Tensor? other, int function, ScalarType dtype, bool keep,"
        " Tensor? order, int k4, int k6, int k8, int format)"
        " -> (Tensor y, Tensor data, Tensor scales)"
    ),
    "attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale)"
        " -> Tensor"
    ),
    "materialize": "(Tensor x) -> Tensor",
    "place_weight": ("(Tensor data, Tensor scales, int k4, int k6, int k8, int format) -> Tensor"),
    "unplace_weight": (
        "(Tensor weight, int n, int k4, int k6, int k8, int format) -> (Tensor data, Tensor scales)"
    ),
}
