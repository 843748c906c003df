"""The schemas of the operators: those of csrc/ops.cpp, which a test compares with these."""

NAMESPACE = "micromix"

SCHEMAS = {
    "quantize": (
        "(Tensor x, Tensor? order, int k4, int k6, int k8, int format)"
        " -> (Tensor data, Tensor scales)"
    ),
    "linear": (
        "(Tensor data, Tensor scales, Tensor weight, Tensor? bias, int n,"
        " int k4, int k6, int k8, int format, ScalarType dtype) -> Tensor"
    ),
    "place_weight": ("(Tensor data, Tensor scales, int k4, int k6, int k8, int format) -> Tensor"),
}
