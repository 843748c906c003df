#include "launch_linear.h"

namespace micromix::blackwell {

cudaError_t launch_e3m2_mxfp4(TileId tile, const LinearArguments& arguments, int column_tiles,
                              cudaStream_t stream) {
  return launch_linear<Formats<Element::kE3M2, true>>(tile, arguments, column_tiles, stream);
}

}  // namespace micromix::blackwell
