// Which instruction set the kernels run on: the best that this machine has, or a lower one that the
// user asked for.
#pragma once

#include <string>

#include "attention.h"
#include "kernels.h"

namespace micromix::cpu {

enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// "portable", "avx2", "avx512", "avx512_bf16" or "amx".
const char* name_of(Isa isa);

// The best instruction set of this machine for which kernels were built. Asks CPUID and the
// operating system once; never looks at the CPU's family or model.
Isa best_isa();

// The instruction set in use. At first MICROMIX_CPU_ISA, where set, or else best_isa().
// Throws std::runtime_error where MICROMIX_CPU_ISA names one that is unknown or missing here.
Isa current_isa();

// Changes the instruction set in use. Throws as current_isa() does.
void set_isa(const std::string& name);

const QuantizeKernel& quantize_kernel();
const LinearKernel& linear_kernel(const LinearTask& task);
const AttentionKernel& attention_kernel(const AttentionTask& task);

}  // namespace micromix::cpu
