#include "attention_lanes.h"

namespace micromix::cpu {

const AttentionKernel kAttentionPortable = kernel("portable");

}  // namespace micromix::cpu
