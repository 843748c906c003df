#include "attention_lanes.h"

namespace micromix::cpu {

const AttentionKernel kAttentionAvx512 = kernel("avx512");

}  // namespace micromix::cpu
