#include "attention_lanes.h"

namespace micromix::cpu {

const AttentionKernel kAttentionAvx2 = kernel("avx2");

}  // namespace micromix::cpu
