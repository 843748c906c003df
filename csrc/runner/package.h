// A package of micromix_compile.export, loaded into a process without Python. Unlike the library,
// this uses LibTorch's C++ API, which changes with torch: the runner is built for one torch.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace micromix::runner {

struct WeightFacts {
  at::ScalarType dtype = at::kByte;
  int64_t offset = 0;
  std::vector<int64_t> shape, stride;
};

// A size of an input: `value`, or where `symbol` is no -1, factor times the symbol plus constant.
struct SizeFacts {
  int64_t value = 0, symbol = -1, smallest = 0, largest = 0, factor = 1, constant = 0;
};

struct InputFacts {
  at::ScalarType dtype = at::kByte;
  std::vector<SizeFacts> shape;
};

struct EntryFacts {
  size_t count = 0;
  std::vector<InputFacts> inputs;
  std::vector<std::pair<std::string, size_t>> constants;  // name, number of the weight
};

// extra/runner.txt of a package: see micromix_compile/archive.py.
struct Manifest {
  std::string abi, torch, device, checksum;
  int64_t bytes = 0;
  std::vector<std::string> cpu_flags;
  std::vector<WeightFacts> weights;
  std::map<std::string, EntryFacts> entries;
  bool decoder = false;
  int64_t batch_size = 0, max_length = 0, vocabulary = 0;
  std::vector<WeightFacts> cache;  // dtype and shape
  std::vector<int64_t> eos;

  static Manifest parse(const std::string& text);
};

// Memory of the weights, in huge pages where the system has them.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  void* mapping_;
  size_t size_;
  uint8_t* data_;
};

// Throws std::runtime_error with a message that says what to do.
class Package {
 public:
  explicit Package(const std::string& path);

  const Manifest& manifest() const { return manifest_; }
  std::vector<at::Tensor> run(const std::string& entry, std::vector<at::Tensor>&& inputs);

 private:
  Manifest manifest_;
  std::unique_ptr<Memory> memory_;
  std::vector<at::Tensor> weights_;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> entries_;
};

// Loads the operators: the library beside the executable, or the one that MICROMIX_LIBRARY names.
void load_operators();

at::ScalarType dtype_of(const std::string& name);

}  // namespace micromix::runner
