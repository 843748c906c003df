// Runs a package without Python:
//   micromix_runner model.pt2 --tokens "1 2 3" [--new 64] [--threads 2] [--ignore-eos]
//   micromix_runner model.pt2 --input int64:2x16:ids.bin ... [--output result]
#include <ATen/Parallel.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "package.h"

namespace {

using micromix::runner::Package;
using Clock = std::chrono::steady_clock;

constexpr const char* kUsage =
    "usage: micromix_runner MODEL.pt2 [--threads N]\n"
    "           --tokens \"ID ID ...\" | --tokens-file FILE [--new N] [--ignore-eos]\n"
    "         | --input DTYPE:SIZExSIZE:FILE ... [--output PREFIX]\n"
    "Generates from token ids, or runs the model once on raw tensors (row by row, as in memory).\n";

constexpr int64_t kMostThreads = 1024;  // OpenMP crashes where it cannot start as many

struct Arguments {
  std::string model, output = "output";
  std::vector<int64_t> tokens;
  std::vector<std::string> inputs;
  int64_t new_tokens = 64;
  int threads = 0;
  bool ignore_eos = false;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

[[noreturn]] void wrong_usage(const std::string& why) {
  std::cerr << "micromix_runner: " << why << "\n" << kUsage;
  std::exit(2);
}

int64_t number(const std::string& text) {
  size_t end = 0;
  int64_t value = -1;
  try {
    value = std::stoll(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != text.size() || value < 0) wrong_usage(text + " is no number");
  return value;
}

std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> result;
  std::istringstream words(text);
  for (std::string word; words >> word;) result.push_back(number(word));
  return result;
}

struct Parts {
  std::string dtype, path;
  std::vector<int64_t> shape;
};

// "int64:2x16:ids.bin"
Parts parts_of(const std::string& text) {
  const size_t first = text.find(':'), second = text.find(':', first + 1);
  if (first == std::string::npos || second == std::string::npos) {
    wrong_usage(text + " is not DTYPE:SIZExSIZE:FILE");
  }
  Parts result{text.substr(0, first), text.substr(second + 1), {}};
  std::istringstream sizes(text.substr(first + 1, second - first - 1));
  for (std::string size; std::getline(sizes, size, 'x');) result.shape.push_back(number(size));
  return result;
}

// Wrong usage is said here, before a package is loaded: exit leaves behind what that unpacked.
Arguments parse(int argc, char** argv) {
  Arguments result;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) wrong_usage(flag + " needs a value");
      return argv[++i];
    };
    if (flag == "--help" || flag == "-h") {
      std::cout << kUsage;
      std::exit(0);
    } else if (flag == "--tokens") {
      result.tokens = numbers(value());
    } else if (flag == "--tokens-file") {
      result.tokens = numbers(read_file(value()));
    } else if (flag == "--new") {
      result.new_tokens = number(value());
    } else if (flag == "--threads") {
      const int64_t threads = number(value());
      if (threads > kMostThreads) {
        wrong_usage("--threads is at most " + std::to_string(kMostThreads));
      }
      result.threads = static_cast<int>(threads);
    } else if (flag == "--ignore-eos") {
      result.ignore_eos = true;
    } else if (flag == "--input") {
      result.inputs.push_back(value());
    } else if (flag == "--output") {
      result.output = value();
    } else if (flag.rfind("--", 0) == 0 || !result.model.empty()) {
      wrong_usage("unknown argument " + flag);
    } else {
      result.model = flag;
    }
  }
  if (result.model.empty()) wrong_usage("no model");
  for (const std::string& input : result.inputs) parts_of(input);
  if (result.tokens.empty() == result.inputs.empty()) wrong_usage("give tokens, or inputs");
  return result;
}

void generate(Package& package, const Arguments& arguments) {
  const auto& facts = package.manifest();
  if (!facts.decoder) throw std::runtime_error("it is no package that generates; give --input");
  const std::vector<int64_t>& prompt = arguments.tokens;
  const auto length = static_cast<int64_t>(prompt.size());
  if (facts.batch_size != 1) {
    throw std::runtime_error("it takes batches of " + std::to_string(facts.batch_size) +
                             " prompts, and this program has one; export it with batch_size=1");
  }
  if (length < 1 || length >= facts.max_length) {
    throw std::runtime_error("it takes one prompt of 1 to " + std::to_string(facts.max_length - 1) +
                             " tokens");
  }
  if (*std::max_element(prompt.begin(), prompt.end()) >= facts.vocabulary) {
    throw std::runtime_error("tokens are 0 to " + std::to_string(facts.vocabulary - 1));
  }
  std::vector<at::Tensor> cache;
  for (const auto& part : facts.cache) cache.push_back(at::zeros(part.shape, part.dtype));
  at::Tensor start = at::zeros({}, at::kLong);

  const auto step = [&](const std::string& entry, const at::Tensor& tokens) {
    std::vector<at::Tensor> inputs{tokens, start};
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    return package.run(entry, std::move(inputs))[0].argmax(-1).item<int64_t>();
  };
  const auto began = Clock::now();
  int64_t token = step(length > 1 ? "prefill" : "decode", at::tensor(prompt).view({1, length}));
  const double prefill = seconds_since(began);
  start.fill_(length);

  const auto decoding = Clock::now();
  const int64_t most = std::min(arguments.new_tokens, facts.max_length - length + 1);
  int64_t count = 0;
  while (count < most) {
    std::printf(count ? " %lld" : "%lld", static_cast<long long>(token));
    std::fflush(stdout);
    ++count;
    const bool ended = std::find(facts.eos.begin(), facts.eos.end(), token) != facts.eos.end();
    if (count == most || (ended && !arguments.ignore_eos)) break;
    token = step("decode", at::tensor({token}).view({1, 1}));
    start.add_(1);
  }
  const double decode = seconds_since(decoding);
  std::printf("\n");
  std::fprintf(stderr, "prefill: %lld tokens in %.3f s, %.1f tokens/s\n",
               static_cast<long long>(length), prefill, static_cast<double>(length) / prefill);
  if (count > 1) {
    std::fprintf(stderr, "decode: %lld tokens in %.3f s, %.1f tokens/s\n",
                 static_cast<long long>(count - 1), decode,
                 static_cast<double>(count - 1) / decode);
  }
}

at::Tensor read_tensor(const std::string& text) {
  const Parts parts = parts_of(text);
  at::Tensor result = at::zeros(parts.shape, micromix::runner::dtype_of(parts.dtype));
  const std::string content = read_file(parts.path);
  if (content.size() != result.nbytes()) {
    throw std::runtime_error(text + ": the file has " + std::to_string(content.size()) +
                             " bytes, the tensor " + std::to_string(result.nbytes()));
  }
  std::copy(content.begin(), content.end(), static_cast<char*>(result.mutable_data_ptr()));
  return result;
}

void run_once(Package& package, const Arguments& arguments) {
  std::vector<at::Tensor> inputs;
  for (const std::string& text : arguments.inputs) inputs.push_back(read_tensor(text));
  const auto began = Clock::now();
  const std::vector<at::Tensor> outputs = package.run("model", std::move(inputs));
  std::fprintf(stderr, "run: %.3f s\n", seconds_since(began));
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor dense = outputs[i].contiguous();
    const std::string path = arguments.output + std::to_string(i) + ".bin";
    std::ofstream file(path, std::ios::binary);
    file.write(static_cast<const char*>(dense.const_data_ptr()),
               static_cast<std::streamsize>(dense.nbytes()));
    if (!file) throw std::runtime_error(path + " cannot be written");
    std::cout << path << " " << dense.dtype().name();
    for (const int64_t size : dense.sizes()) std::cout << " " << size;
    std::cout << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parse(argc, argv);
    if (arguments.threads > 0) at::set_num_threads(arguments.threads);
    const c10::InferenceMode no_gradients;
    const auto began = Clock::now();
    micromix::runner::load_operators();
    Package package(arguments.model);
    std::fprintf(stderr, "load: %.3f s, %.1f MB of weights\n", seconds_since(began),
                 static_cast<double>(package.manifest().bytes) / 1e6);
    arguments.inputs.empty() ? generate(package, arguments) : run_once(package, arguments);
    std::cout.flush();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) || !std::cout) {
      throw std::runtime_error("the output cannot be written");
    }
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "micromix_runner: error: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "micromix_runner: error: " << error.what() << "\n";
  }
  return 1;
}
