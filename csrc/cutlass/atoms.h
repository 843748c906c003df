// The two instructions that the kernel is built from, with one interface and one arrangement of
// registers, in three implementations: native (sm_120a, sm_121a), in software on other devices, and
// in software on the host.
//
//   load_matrices<kBits>(out, address)
//     Four 8 x 16 matrices of codes from shared memory. Lane l gives the address of row l % 8 of
//     matrix l / 8, 16 bytes that hold 16 codes: a byte each, or packed in the first 12 (6 bits) or
//     8 (4 bits). out[j] of lane l: codes 4 (l % 4) to + 3 of row l / 4 of matrix j, a byte each:
//     8 bits, 6 bits in the low end, or 4 bits in bits 2 to 5.
//   multiply<kPacked, A, B>(sums, a, b, scale_a, scale_b)
//     sums[16 x 8] += (A scaled)[16 x K] (B scaled)[8 x K]^T, K = 32 codes, a byte each, or,
//     packed, K = 64 MXFP4 codes. With g = l / 4, q = l % 4 and w = 4 (packed: 8) codes a register,
//     a[i]: row g + 8 (i % 2), codes K / 2 (i / 2) + w q; b[i]: column g, codes K / 2 i + w q;
//     sums[i]: row g + 8 (i / 2), column 2 q + i % 2. The scale of row m comes from lane
//     4 (m % 8) + m / 8, that of column n from lane 4 n: byte 0, and byte 1 for the upper 32 codes.
//
// The native forms are CuTe's.
#pragma once

#include "elements.h"
#include "machine.h"

// In every pass of the compilation, the host's too: they must agree on what CuTe declares.
#if defined(MICROMIX_NATIVE_ATOMS)
#include <cute/arch/copy_sm100.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm120.hpp>
#endif

#if defined(MICROMIX_SIMULATOR)
#include "atoms_simulated.h"
#elif defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#include "atoms_native.h"
#else
#include "atoms_emulated.h"
#endif
