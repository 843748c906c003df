#include "package.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/version.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>

namespace micromix::runner {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMost = int64_t{1} << 40;  // bytes, and elements of a dimension

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

// The words of one line, with checks.
class Line {
 public:
  explicit Line(const std::string& text) : text_(text), words_(text) {}
  std::string word() {
    std::string result;
    if (!(words_ >> result)) refuse("the manifest is damaged: " + text_);
    return result;
  }
  int64_t number() {
    int64_t result = 0;
    if (!(words_ >> result) || result < 0 || result > kMost) {
      refuse("the manifest is damaged: " + text_);
    }
    return result;
  }
  // A number that may be negative.
  int64_t offset() {
    const std::string text = word();
    Line digits(text[0] == '-' ? text.substr(1) : text);
    return text[0] == '-' ? -digits.number() : digits.number();
  }
  std::vector<int64_t> numbers() {
    const int64_t count = number();
    if (count > 16) refuse("the manifest is damaged: " + text_);
    std::vector<int64_t> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(number());
    return result;
  }
  std::string rest() {
    std::string result;
    std::getline(words_ >> std::ws, result);
    return result;
  }

 private:
  std::string text_;
  std::istringstream words_;
};

// "= SIZE", or "SYMBOL smallest largest factor constant", largest 0 for no bound.
SizeFacts size_of(Line& line) {
  SizeFacts result;
  const std::string first = line.word();
  if (first == "=") {
    result.value = line.number();
    return result;
  }
  result.symbol = Line(first).number();
  result.smallest = line.number();
  result.largest = line.number();
  result.factor = line.number();
  result.constant = line.offset();
  if (result.largest == 0) result.largest = kMost;
  if (result.factor == 0) refuse("the manifest is damaged: " + first);
  return result;
}

// As _checksum of micromix_compile/export.py. LibTorch's reader does not look at the archive's CRC.
std::string checksum(const uint8_t* data, size_t bytes) {
  uint64_t total = 0;
  for (size_t i = 0; i < bytes / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, data + 8 * i, sizeof(word));
    total += word * (2 * i + 1);
  }
  std::ostringstream text;
  text << std::hex << total;
  return text.str();
}

[[noreturn]] void refuse_input(size_t i, const at::Tensor& tensor, const InputFacts& expected) {
  std::ostringstream text;
  text << "input " << i << " is " << tensor.dtype().name() << " " << tensor.sizes()
       << ", and the graph takes " << c10::toString(expected.dtype);
  const char* between = " ";
  for (const SizeFacts& size : expected.shape) {
    text << between;
    between = " x ";
    if (size.symbol < 0) {
      text << size.value;
    } else {
      text << size.factor << "*s" << size.symbol << "+" << size.constant << " (s" << size.symbol
           << " from " << size.smallest << " to " << size.largest << ")";
    }
  }
  refuse(text.str());
}

// What compiled code takes for granted of its arguments: it looks at their memory only.
void check_inputs(const std::vector<InputFacts>& expected, const std::vector<at::Tensor>& given) {
  std::map<int64_t, int64_t> symbols;
  for (size_t i = 0; i < expected.size(); ++i) {
    const at::Tensor& tensor = given[i];
    const std::vector<SizeFacts>& shape = expected[i].shape;
    bool fits = tensor.scalar_type() == expected[i].dtype &&
                tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t d = 0; fits && d < shape.size(); ++d) {
      const SizeFacts& size = shape[d];
      const int64_t found = tensor.size(static_cast<int64_t>(d));
      if (size.symbol < 0) {
        fits = found == size.value;
        continue;
      }
      const int64_t rest = found - size.constant, value = rest / size.factor;
      fits = rest % size.factor == 0 && value >= size.smallest && value <= size.largest &&
             symbols.emplace(size.symbol, value).first->second == value;
    }
    if (!fits) refuse_input(i, tensor, expected[i]);
  }
}

// The bytes from a weight's first element to its last.
int64_t span(const WeightFacts& weight) {
  int64_t last = 0;
  for (size_t i = 0; i < weight.shape.size(); ++i) {
    if (weight.shape[i] == 0) return 0;
    __int128 part = static_cast<__int128>(weight.shape[i] - 1) * weight.stride[i] + last;
    if (part > kMost) refuse("a weight lies outside of the weights");
    last = static_cast<int64_t>(part);
  }
  return (last + 1) * static_cast<int64_t>(c10::elementSize(weight.dtype));
}

std::set<std::string> cpu_flags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

std::string minor_of(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

// The ABI version of the operators that were loaded.
std::string operators_abi() {
  const auto schema = c10::Dispatcher::singleton().findSchema({"micromix::build_info", ""});
  if (!schema) refuse("libmicromix.so is no library of operators");
  std::vector<c10::IValue> stack;
  schema->callBoxed(stack);
  Line line(stack.at(0).toStringRef().substr(4));  // after "abi="
  return line.word();
}

// Where LibTorch unpacks code, which it needs until it is loaded: a process that is killed later
// leaves nothing behind.
class UnpackFolder {
 public:
  UnpackFolder()
      : parent_(std::filesystem::temp_directory_path()), path_(parent_ / "micromix_runner.XXXXXX") {
    if (!mkdtemp(path_.data())) refuse("no folder can be made at " + path_);
    setenv("TMPDIR", path_.c_str(), 1);
  }
  ~UnpackFolder() {
    setenv("TMPDIR", parent_.c_str(), 1);
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  UnpackFolder(const UnpackFolder&) = delete;
  UnpackFolder& operator=(const UnpackFolder&) = delete;

 private:
  std::filesystem::path parent_;
  std::string path_;
};

void check_target(const Manifest& manifest) {
  std::string differences;
  const std::string torch =
      std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  if (minor_of(manifest.torch) != torch) {
    differences += "\n  torch " + manifest.torch + ", and here is " + torch;
  }
  const std::string abi = operators_abi();
  if (manifest.abi != abi) {
    differences += "\n  operators " + manifest.abi + ", and here are " + abi;
  }
  if (manifest.device != "cpu") {
    differences += "\n  the device " + manifest.device + ", and this program runs on the CPU";
  }
  const std::set<std::string> here = cpu_flags();
  for (const std::string& flag : manifest.cpu_flags) {
    if (!here.count(flag)) differences += "\n  a CPU with " + flag;
  }
  if (!differences.empty()) {
    refuse("it was exported for something else than what runs here:" + differences +
           "\nExport the model again here.");
  }
}

}  // namespace

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known{
      {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}, {"float32", at::kFloat},
      {"float64", at::kDouble},    {"int64", at::kLong},   {"int32", at::kInt},
      {"int16", at::kShort},       {"int8", at::kChar},    {"uint8", at::kByte},
      {"bool", at::kBool}};
  const auto found = known.find(name);
  if (found == known.end()) refuse("unknown dtype " + name);
  return found->second;
}

Manifest Manifest::parse(const std::string& text) {
  Manifest result;
  std::istringstream lines(text);
  bool known_format = false;
  for (std::string content; std::getline(lines, content);) {
    Line line(content);
    const std::string kind = line.word();
    if (kind == "format") {
      known_format = line.number() == 2;
      if (!known_format) break;
    } else if (kind == "abi") {
      result.abi = line.word();
    } else if (kind == "torch") {
      result.torch = line.word();
    } else if (kind == "device") {
      result.device = line.word();
    } else if (kind == "bytes") {
      result.bytes = line.number();
    } else if (kind == "checksum") {
      result.checksum = line.word();
    } else if (kind == "flag") {
      result.cpu_flags.push_back(line.word());
    } else if (kind == "weight") {
      WeightFacts weight;
      weight.dtype = dtype_of(line.word());
      weight.offset = line.number();
      weight.shape = line.numbers();
      weight.stride = line.numbers();
      if (weight.shape.size() != weight.stride.size() || weight.offset % kAlignment) {
        refuse("the manifest is damaged: " + content);
      }
      result.weights.push_back(std::move(weight));
    } else if (kind == "entry") {
      const std::string name = line.word();
      result.entries[name].count = static_cast<size_t>(line.number());
    } else if (kind == "input") {
      InputFacts& input = result.entries[line.word()].inputs.emplace_back();
      input.dtype = dtype_of(line.word());
      const int64_t dimensions = line.number();
      if (dimensions > 16) refuse("the manifest is damaged: " + content);
      for (int64_t i = 0; i < dimensions; ++i) input.shape.push_back(size_of(line));
    } else if (kind == "constant") {
      const std::string entry = line.word();
      const auto weight = static_cast<size_t>(line.number());
      if (weight >= result.weights.size()) refuse("a constant has no weight");
      result.entries[entry].constants.emplace_back(line.rest(), weight);
    } else if (kind == "decoder") {
      result.decoder = true;
      result.batch_size = line.number();
      result.max_length = line.number();
      result.vocabulary = line.number();
    } else if (kind == "cache") {
      WeightFacts cache;
      cache.dtype = dtype_of(line.word());
      cache.shape = line.numbers();
      result.cache.push_back(std::move(cache));
    } else if (kind == "eos") {
      result.eos.push_back(line.number());
    } else {
      refuse("the manifest is damaged: " + content);
    }
  }
  if (!known_format) refuse("its format is not the one that this program reads; export it again");
  for (const WeightFacts& weight : result.weights) {
    if (weight.offset + span(weight) > result.bytes) refuse("a weight lies outside of the weights");
  }
  for (const auto& [name, facts] : result.entries) {
    if (facts.count != facts.inputs.size()) refuse("the inputs of " + name + " are not all named");
  }
  return result;
}

Memory::Memory(int64_t bytes) : size_(static_cast<size_t>(bytes + kHugePage)) {
  mapping_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) refuse("there is no memory for the weights");
  madvise(mapping_, size_, MADV_HUGEPAGE);  // a refusal costs speed only
  const auto address = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
}

Memory::~Memory() { munmap(mapping_, size_); }

Package::Package(const std::string& path) {
  try {
    caffe2::serialize::PyTorchStreamReader archive(path);
    if (!archive.hasRecord("extra/runner.txt")) refuse("it was not written by micromix_compile");
    const auto [text, size] = archive.getRecord("extra/runner.txt");
    manifest_ = Manifest::parse({static_cast<const char*>(text.get()), size});
    check_target(manifest_);
    const auto bytes = static_cast<size_t>(manifest_.bytes);
    if (archive.getRecordSize("extra/weights.bin") != bytes) refuse("its weights are cut short");
    memory_ = std::make_unique<Memory>(manifest_.bytes);
    if (bytes > 0) archive.getRecord("extra/weights.bin", memory_->data(), bytes);
    if (checksum(memory_->data(), bytes) != manifest_.checksum) refuse("its weights are damaged");
  } catch (const c10::Error& error) {
    refuse(std::string("it is truncated or damaged: ") + error.what_without_backtrace());
  }
  for (const WeightFacts& weight : manifest_.weights) {
    weights_.push_back(at::from_blob(memory_->data() + weight.offset, weight.shape, weight.stride,
                                     at::TensorOptions().dtype(weight.dtype)));
  }
  const UnpackFolder folder;
  for (const auto& [name, facts] : manifest_.entries) {
    auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, name);
    std::unordered_map<std::string, at::Tensor> constants;
    for (const auto& [fqn, weight] : facts.constants) constants.emplace(fqn, weights_[weight]);
    const std::vector<std::string> wanted = loader->get_constant_fqns();
    bool same = wanted.size() == constants.size();
    for (const std::string& fqn : wanted) same = same && constants.count(fqn);
    if (!same) refuse("the code of " + name + " wants other weights");
    loader->load_constants(constants, false, true, true);
    entries_.emplace(name, std::move(loader));
  }
}

std::vector<at::Tensor> Package::run(const std::string& entry, std::vector<at::Tensor>&& inputs) {
  const auto found = entries_.find(entry);
  if (found == entries_.end()) refuse("the package has no graph " + entry);
  const EntryFacts& facts = manifest_.entries.at(entry);
  if (inputs.size() != facts.count) {
    refuse("the graph takes " + std::to_string(facts.count) + " tensors, and there are " +
           std::to_string(inputs.size()));
  }
  check_inputs(facts.inputs, inputs);
  return found->second->boxed_run(std::move(inputs));
}

void load_operators() {
  const char* const named = std::getenv("MICROMIX_LIBRARY");
  std::string path = named ? named : "";
  if (path.empty()) {
    char self[PATH_MAX];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof(self));
    if (length < 0 || length == sizeof(self)) refuse("/proc/self/exe cannot be read");
    path = std::filesystem::path(std::string(self, static_cast<size_t>(length))).parent_path() /
           "libmicromix.so";
  }
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
    refuse("the operators cannot be loaded: " + std::string(dlerror()) +
           "; name the library in MICROMIX_LIBRARY");
  }
}

}  // namespace micromix::runner
