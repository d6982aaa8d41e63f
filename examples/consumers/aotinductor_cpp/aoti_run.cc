// Runs an engine of exportyard's backend `aotinductor` once, without Python:
//
//   aoti_run MODEL.pt2 OUTPUT_FOLDER FILE:TYPE:SIZExSIZE... [FILE:TYPE:SIZExSIZE... ...]
//
// The inputs come in the order of signature.json, each a file with its numbers alone, little endian, in rows:
// `images.raw:float32:2x1x8x8`. Outputs are written in that way to OUTPUT_FOLDER/output_0.raw, output_1.raw ...

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

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

at::ScalarType TypeOf(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf},
      {"int64", at::kLong},    {"int32", at::kInt},      {"int16", at::kShort},
      {"int8", at::kChar},     {"uint8", at::kByte},     {"bool", at::kBool}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("unknown type `" + name + "`");
  return found->second;
}

at::Tensor Input(const std::string& description) {
  const auto parts = Split(description, ':');
  if (parts.size() < 2) throw std::runtime_error("`" + description + "` is not FILE:TYPE:SIZExSIZE");
  std::vector<int64_t> shape;
  if (parts.size() > 2) {
    for (const auto& size : Split(parts[2], 'x')) shape.push_back(std::stoll(size));
  }
  auto tensor = at::empty(shape, at::TensorOptions().dtype(TypeOf(parts[1])));
  std::ifstream stream(parts[0], std::ios::binary);
  if (!stream) throw std::runtime_error("can't read `" + parts[0] + "`");
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  if (bytes.size() != tensor.nbytes()) {
    throw std::runtime_error("`" + parts[0] + "` has " + std::to_string(bytes.size()) + " bytes, expected " +
                             std::to_string(tensor.nbytes()));
  }
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(tensor.data_ptr()));
  return tensor;
}

void Write(const at::Tensor& found, const std::string& path) {
  const auto tensor = found.contiguous();
  std::ofstream stream(path, std::ios::binary);
  stream.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!stream) throw std::runtime_error("can't write `" + path + "`");
  std::cout << path << ' ' << tensor.scalar_type() << ' ' << tensor.sizes() << '\n';
}

void Run(const std::string& model, const std::string& folder, const std::vector<std::string>& descriptions) {
  CheckCpu(model);
  const c10::InferenceMode guard;
  Loader loader(model);  // once; calls may come from several threads
  std::vector<at::Tensor> inputs;
  for (const auto& description : descriptions) inputs.push_back(Input(description));
  const auto outputs = loader.run(inputs);
  for (size_t place = 0; place < outputs.size(); ++place) {
    Write(outputs[place], folder + "/output_" + std::to_string(place) + ".raw");
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: aoti_run MODEL.pt2 OUTPUT_FOLDER FILE:TYPE:SIZExSIZE...\n";
    return 2;
  }
  try {
    Run(arguments[1], arguments[2], {arguments + 3, arguments + count});
  } catch (const c10::Error& error) {
    std::cerr << "aoti_run: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "aoti_run: " << error.what() << '\n';
    return 1;
  }
}
