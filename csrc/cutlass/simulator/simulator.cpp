// The machine of machine.h, and the linear kernel on it as a C interface: for tests, which load it
// with ctypes. Build: g++ -std=c++20 -O2 -shared -fPIC -DMICROMIX_SIMULATOR simulator.cpp
#include <ucontext.h>

#include <csetjmp>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../heuristic.h"
#include "../linear_kernel.h"

namespace micromix::blackwell {

namespace simulator {

namespace {

constexpr int kStackBytes = 64 * 1024, kWords = 8, kPoison = 0xFF;  // a NaN as code and as scale

struct Copy {
  uint32_t to;
  const uint8_t* from;
  int bytes, valid;
};

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false, at_block_barrier = false;
  int exchanges = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;  // committed, not landed
};

struct Range {
  const uint8_t *start, *end;
};

Options options;
std::vector<Range> readable;
std::vector<uint8_t> memory;
std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<uint32_t> slots;  // [2][threads][kWords]
Barrier block_wide;
int current, blocks[3];
std::jmp_buf scheduler;
ucontext_t scheduler_context;
std::string failure;
const std::function<void()>* body;

void yield() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void arrive(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

void land(const Copy& copy) {
  uint8_t* const to = shared(copy.to, copy.bytes);
  std::memset(to, 0, copy.bytes);
  if (copy.valid) std::memcpy(to, copy.from, copy.valid);
}

void run_fiber() {
  (*body)();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends.
void resume(int fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  Fiber& f = fibers[fiber];
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  f.stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  makecontext(&f.context, run_fiber, 0);
  setcontext(&f.context);
}

// A warp runs alone for a while, so that it overtakes the others where no barrier holds it.
void run_block(std::mt19937& random) {
  const int threads = static_cast<int>(fibers.size());
  for (bool alive = true; alive && failure.empty();) {
    const int warp = static_cast<int>(random() % (threads / 32));
    for (int turn = 1 + static_cast<int>(random() % 400); turn > 0; --turn) {
      bool moves = false;
      for (int lane = 0; lane < 32 && failure.empty(); ++lane) {
        const int fiber = warp * 32 + lane;
        if (!fibers[fiber].done) resume(fiber);
        moves |= !fibers[fiber].done && !fibers[fiber].at_block_barrier;
      }
      if (!moves || !failure.empty()) break;
    }
    alive = false;
    for (const Fiber& fiber : fibers) alive |= !fiber.done;
  }
}

}  // namespace

int thread() { return current; }
int block(int dimension) { return blocks[dimension]; }

void fail(const char* what) {
  failure = what + (" (thread " + std::to_string(current) + ")");
  _longjmp(scheduler, 1);
}

void block_barrier() {
  fibers[current].at_block_barrier = true;
  arrive(block_wide);
  fibers[current].at_block_barrier = false;
}

uint8_t* shared(uint32_t address, int bytes) {
  if (address % bytes != 0) fail("misaligned shared memory access");
  if (address + bytes > memory.size()) fail("shared memory access out of bounds");
  return memory.data() + address;
}

const uint32_t* exchange(const uint32_t* words, int count) {
  const int threads = static_cast<int>(fibers.size());
  uint32_t* const buffer = &slots[fibers[current].exchanges++ % 2 * threads * kWords];
  std::copy(words, words + count, buffer + current * kWords);
  arrive(warps[current / 32]);
  return buffer + current / 32 * 32 * kWords;
}

void allow(const void* start, int64_t bytes) {
  const auto* const first = static_cast<const uint8_t*>(start);
  readable.push_back({first, first + bytes});
}

void issue_copy(uint32_t to, const void* from, int bytes, int valid) {
  const auto* const source = static_cast<const uint8_t*>(from);
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail("misaligned copy");
  if (valid < 0 || valid > bytes) fail("copy of a wrong size");
  bool allowed = valid == 0;
  for (const Range& range : readable)
    allowed |= source >= range.start && source + valid <= range.end;
  if (!allowed) fail("copy from outside of the operands");
  const Copy copy{to, source, bytes, valid};
  if (options.late_copies) {
    fibers[current].open.push_back(copy);
  } else {
    land(copy);
  }
}

void commit() {
  fibers[current].groups.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
}

void wait(int pending) {
  auto& groups = fibers[current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

void launch(int threads, const int (&grid)[3], int shared_bytes, const Options& wanted,
            const std::function<void()>& kernel) {
  options = wanted;
  body = &kernel;
  failure.clear();
  std::mt19937 random(options.seed);
  for (blocks[2] = 0; blocks[2] < grid[2]; ++blocks[2])
    for (blocks[1] = 0; blocks[1] < grid[1]; ++blocks[1])
      for (blocks[0] = 0; blocks[0] < grid[0]; ++blocks[0]) {
        memory.assign(shared_bytes, kPoison);
        fibers.clear();
        fibers.resize(threads);
        warps.assign(threads / 32, Barrier{32});
        block_wide = Barrier{threads};
        slots.assign(2 * threads * kWords, 0);
        run_block(random);
        if (!failure.empty()) return;
      }
}

}  // namespace simulator

namespace {

// All tiles have all formats; or each has its own, which is soon compiled and enough for mutants.
template <typename T, typename F>
constexpr bool is_compiled() {
#ifdef MICROMIX_SIMULATOR_FEW
  constexpr bool kE3M2 = F::a(1) == Element::kE3M2, kMxfp4 = F::b(2) == Element::kE2M1;
  return T::kM == (kE3M2 ? (kMxfp4 ? 128 : 64) : (kMxfp4 ? 32 : 16));
#else
  return true;
#endif
}

template <typename F>
void run(TileId id, const LinearArguments& arguments, int column_tiles,
         const simulator::Options& options) {
  with_tile(id, [&](auto tile) {
    using T = decltype(tile);
    const int grid[3] = {column_tiles, (arguments.m + T::kM - 1) / T::kM, arguments.splits};
    if constexpr (is_compiled<T, F>()) {
      simulator::launch(T::kThreads, grid, T::kSharedBytes, options,
                        [&] { linear_block<T, F>(arguments, 0); });
    } else {
      simulator::failure = "the tile was not compiled for these formats";
    }
  });
}

}  // namespace

}  // namespace micromix::blackwell

using namespace micromix::blackwell;

extern "C" {

int64_t placed_bytes(int64_t n, int64_t k4, int64_t k6, int64_t k8, int format) {
  return PlacedWeight({k4, k6, k8, format}).bytes(n);
}

// `placed` is zero.
void place(int64_t n, int64_t k4, int64_t k6, int64_t k8, int format, const uint8_t* data,
           const uint8_t* scales, uint8_t* placed) {
  const mx::MixedLayout layout{k4, k6, k8, format}, own = layout.weight();
  for (int64_t row = 0; row < n; ++row)
    for (int64_t block = 0; block < own.blocks(); ++block)
      place_block(PlacedWeight(layout), own.row_bytes(), own.blocks(), data, scales, placed, row,
                  block);
}

int tile_for(int64_t m) { return static_cast<int>(choose_tile(m)); }
int splits_for(int64_t blocks, int stages, int multiprocessors) {
  return choose_splits(blocks, stages, multiprocessors);
}

// A product with `count` weights; dtypes are those of Dtype. Returns what went wrong, or null.
const char* linear(int tile, int splits, int late_copies, unsigned seed, int64_t m, int64_t k4,
                   int64_t k6, int64_t k8, int format, const uint8_t* data, const uint8_t* scales,
                   int count, const int64_t* n, const uint8_t* const* placed,
                   const void* const* biases, int bias_dtype, void* const* outs, int out_dtype) {
  const mx::MixedLayout layout{k4, k6, k8, format};
  LinearArguments arguments = arguments_of(layout);
  arguments.data = data;
  arguments.scales = scales;
  arguments.m = static_cast<int>(m);
  arguments.out_dtype = static_cast<micromix::Dtype>(out_dtype);
  arguments.splits = splits;
  arguments.weight_count = count;
  int column_tiles = 0, columns = 0;
  const int tile_n = with_tile(static_cast<TileId>(tile), [](auto t) { return decltype(t)::kN; });
  simulator::readable.clear();
  simulator::allow(data, m * layout.row_bytes());
  simulator::allow(scales, m * layout.blocks());
  for (int i = 0; i < count; ++i) {
    arguments.weights[i] = {placed[i],
                            biases[i],
                            outs[i],
                            static_cast<micromix::Dtype>(bias_dtype),
                            static_cast<int>(n[i]),
                            column_tiles,
                            columns};
    column_tiles += static_cast<int>((n[i] + tile_n - 1) / tile_n);
    columns += static_cast<int>((n[i] + 7) / 8 * 8);
    simulator::allow(placed[i], PlacedWeight(layout).bytes(n[i]));
  }
  std::vector<float> partial(splits > 1 ? splits * m * columns : 0, NAN);
  arguments.partial = partial.data();
  arguments.columns = columns;

  const simulator::Options options{late_copies != 0, seed};
  const bool e3m2 = format & mx::MixedLayout::kFormat6Bit;
  const bool mxfp4 = format & mx::MixedLayout::kWeightIsMxfp4Bit;
  const auto run_formats =
      mxfp4 ? (e3m2 ? run<Formats<Element::kE3M2, true>> : run<Formats<Element::kE2M3, true>>)
            : (e3m2 ? run<Formats<Element::kE3M2, false>> : run<Formats<Element::kE2M3, false>>);
  run_formats(static_cast<TileId>(tile), arguments, column_tiles, options);
  if (!simulator::failure.empty()) return simulator::failure.c_str();
  if (splits > 1) {
    for (int64_t row = 0; row < m; ++row)
      for (int column = 0; column < columns; column += 8) add_partial_sums(arguments, row, column);
  }
  return nullptr;
}
}
