// Runs an engine of exportyard's backend `aotinductor`, without Python:
//
//   aoti_run RELEASE_FOLDER TARGET
//   aoti_run MODEL.pt2 OUTPUT_FOLDER FILE:TYPE:SIZExSIZE... [FILE:TYPE:SIZExSIZE... ...]
//
// The first form checks the engine on the release's golden vectors, and ends with 0 if all is well, or 1. The second runs
// it once: the inputs come in the order of signature.json, each a file with its numbers alone, little endian, in rows:
// `images.raw:float32:2x1x8x8`. Outputs are written in that way to OUTPUT_FOLDER/output_0.raw, output_1.raw ...
// Anything that is missing ends with 2.

#include <iostream>
#include <set>
#include <sstream>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "../release.h"

namespace {

using release::Tensor;
using Loader = torch::inductor::AOTIModelPackageLoader;

std::vector<std::string> Split(const std::string& text, char separator) {
  std::istringstream stream(text);
  std::vector<std::string> parts;
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// torch's loader only warns where the code needs a better CPU, and then the process dies of an unknown instruction.
void CheckCpu(const std::string& model) {
  const auto metadata = Loader::load_metadata_from_package(model, "model");
  const auto needed = metadata.find("EXPORTYARD_CPU_FEATURES");
  if (needed == metadata.end()) throw std::runtime_error("`" + model + "` is no engine of exportyard");
  std::ifstream info("/proc/cpuinfo");
  std::set<std::string> has;
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    for (const auto& feature : Split(line.substr(line.find(':') + 1), ' ')) has.insert(feature);
    break;
  }
  for (const auto& feature : Split(needed->second, ' ')) {
    if (has.count(feature) == 0) throw std::runtime_error("this CPU lacks `" + feature + "`, which the engine needs");
  }
}

const std::map<std::string, at::ScalarType>& Types() {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf},
      {"int64", at::kLong},    {"int32", at::kInt},      {"int16", at::kShort},
      {"int8", at::kChar},     {"uint8", at::kByte},     {"bool", at::kBool}};
  return known;
}

// One engine, loaded once; calls may come from several threads.
class Engine {
 public:
  explicit Engine(const std::string& model) : loader_((CheckCpu(model), model)) {}

  std::vector<Tensor> Run(const std::vector<Tensor>& feeds) {
    const c10::InferenceMode guard;
    std::vector<at::Tensor> inputs;
    for (const Tensor& feed : feeds) {
      inputs.push_back(at::empty(feed.shape, at::TensorOptions().dtype(Types().at(feed.dtype))));
      std::copy(feed.bytes.begin(), feed.bytes.end(), static_cast<char*>(inputs.back().data_ptr()));
    }
    std::vector<Tensor> found;
    for (const at::Tensor& output : loader_.run(inputs)) found.push_back(Copied(output.contiguous()));
    return found;
  }

 private:
  static Tensor Copied(const at::Tensor& tensor) {
    Tensor found;
    for (const auto& [name, type] : Types()) {
      if (type == tensor.scalar_type()) found.dtype = name;
    }
    found.shape = tensor.sizes().vec();
    found.bytes.assign(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
    return found;
  }

  Loader loader_;
};

Tensor ReadRaw(const std::string& description) {
  const auto parts = Split(description, ':');
  if (parts.size() < 2) throw std::runtime_error("`" + description + "` is not FILE:TYPE:SIZExSIZE");
  Tensor found;
  found.dtype = parts[1];
  if (parts.size() > 2) {
    for (const auto& size : Split(parts[2], 'x')) found.shape.push_back(std::stoll(size));
  }
  const auto size = release::ByteSize(found.dtype, found.shape);
  found.bytes = release::Read(parts[0]);
  if (found.bytes.size() != size) {
    throw std::runtime_error("`" + parts[0] + "` has " + std::to_string(found.bytes.size()) + " bytes, expected " +
                             std::to_string(size));
  }
  return found;
}

void WriteRaw(const Tensor& tensor, const std::string& path) {
  std::ofstream stream(path, std::ios::binary);
  stream.write(tensor.bytes.data(), static_cast<std::streamsize>(tensor.bytes.size()));
  if (!stream) throw std::runtime_error("can't write `" + path + "`");
  std::cout << path << ' ' << tensor.dtype << ' ' << at::IntArrayRef(tensor.shape) << '\n';
}

void RunOnce(const std::string& model, const std::string& folder, const std::vector<std::string>& descriptions) {
  Engine engine(model);
  std::vector<Tensor> inputs;
  for (const auto& description : descriptions) inputs.push_back(ReadRaw(description));
  const auto outputs = engine.Run(inputs);
  for (size_t place = 0; place < outputs.size(); ++place) {
    WriteRaw(outputs[place], folder + "/output_" + std::to_string(place) + ".raw");
  }
}

bool CheckGolden(const std::string& folder, const std::string& target) {
  const release::Release found(folder);
  Engine engine(found.File(found.Engine(target), {".pt2"}));
  return release::Check(found, target, [&](const std::vector<Tensor>& feeds) { return engine.Run(feeds); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: aoti_run RELEASE_FOLDER TARGET\n"
                 "       aoti_run MODEL.pt2 OUTPUT_FOLDER FILE:TYPE:SIZExSIZE...\n";
    return 2;
  }
  try {
    if (count == 3) return CheckGolden(arguments[1], arguments[2]) ? 0 : 1;
    RunOnce(arguments[1], arguments[2], {arguments + 3, arguments + count});
  } catch (const c10::Error& error) {
    std::cerr << "aoti_run: " << error.what_without_backtrace() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "aoti_run: " << error.what() << '\n';
    return 2;
  }
  return 0;
}
