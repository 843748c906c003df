// The product for many rows, on AMX.
#include "amx_blocked.h"
#include "amx_streamed.h"
#include "many_rows.h"

namespace micromix::cpu {
namespace {

using namespace avx512;

struct AmxProducts {
  using Guard = Tiles;
  static constexpr int kOffset = 0;
  static constexpr bool kScales = false;
  static constexpr int64_t kStrips = 64;
  static constexpr int64_t kStreamedBytes = kRing * 2 * kTileBytes;

  static bool is_streamed(const LinearTask& task) {
    constexpr int64_t kRows = 64, kRowsOfIntegers = 48;
    return task.m <= (has_integers(task) ? kRowsOfIntegers : kRows);
  }

  static int64_t pairs(int64_t strips) { return strips > kManyStrips ? kMaxPairs : kPairs; }

  static void run_streamed(const Context& context, int64_t first_panel) {
    avx512::run_streamed(context, first_panel);
  }

  template <bool kIntegers>
  static void multiply_range(const BlockedContext& context, const Range& range,
                             const Decoded& decoded, int64_t tiles, uint32_t begun, bool ends) {
    avx512::multiply_range<kIntegers>(context, range, decoded, tiles, begun, ends);
  }
};

}  // namespace

const LinearKernel kLinearAmx = ManyRows<AmxProducts>::kernel("amx");

}  // namespace micromix::cpu
