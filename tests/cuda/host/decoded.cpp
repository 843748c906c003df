// A weight placed, decoded to memory, and its sums finished, for test_decoded_on_host.py.
#include "decode.h"

using namespace micromix;
using namespace micromix::cuda;

extern "C" int64_t placed_bytes(int64_t n, int64_t k4, int64_t k6, int64_t k8, int code) {
  return decoded_weight_bytes({k4, k6, k8, code}, n);
}

// `largest`: of the rows' scales, which the host's kernels do not find. Results are float32.
extern "C" void place_and_decode(const uint8_t* data, const uint8_t* scales, const uint8_t* largest,
                                 int64_t n, int64_t k4, int64_t k6, int64_t k8, int code,
                                 uint8_t* placed, void* values) {
  const mx::MixedLayout own{k4, k6, k8, code};
  const PackedRows rows = packed_rows(own, data, scales, n);
  const Steps steps(own);
  const Launcher on{nullptr, 0, false, false};
  launch_place(rows, steps, placed, on);
  launch_decode_weight({placed, largest, n, steps, rows.e3m2}, values, on);
}

extern "C" void finish_sums(const float* sums, const uint8_t* largest_of_rows,
                            const uint8_t* largest_of_columns, const float* bias, int64_t m,
                            int64_t n, float* out) {
  const Results results{largest_of_rows, largest_of_columns, m, n, n, bias, Dtype::kFloat32, out,
                        Dtype::kFloat32};
  launch_finish(sums, results, Launcher{nullptr, 0, false, false});
}
