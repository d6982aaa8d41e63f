// Runs an engine of exportyard's backend `tvm` once, without Python:
//
//   tvm_run ENGINE_FOLDER INPUT_FOLDER OUTPUT_FOLDER [axis=size ...]
//
// It reads INPUT_FOLDER/<input>.raw and writes OUTPUT_FOLDER/<output>.raw: the numbers alone, little endian, in rows.
// Names, types and shapes come from signature.json in the engine's folder; a shape's axes get the sizes that are given.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

namespace {

using Sizes = std::map<std::string, int64_t>;

// Memory for a tensor, aligned as TVM's code expects it.
struct Memory {
  void AllocData(DLTensor* tensor) {
    if (posix_memalign(&tensor->data, 64, ffi::GetDataSize(*tensor) + 1) != 0) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

std::string Read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("can't read `" + path + "`");
  return {std::istreambuf_iterator<char>(stream), {}};
}

DLDataType TypeOf(const std::string& name) {
  static const std::map<std::string, DLDataType> known = {
      {"float32", {kDLFloat, 32, 1}}, {"float64", {kDLFloat, 64, 1}}, {"float16", {kDLFloat, 16, 1}},
      {"int64", {kDLInt, 64, 1}},     {"int32", {kDLInt, 32, 1}},     {"int16", {kDLInt, 16, 1}},
      {"int8", {kDLInt, 8, 1}},       {"uint8", {kDLUInt, 8, 1}},     {"bool", {kDLBool, 8, 1}}};
  return known.at(name);
}

// A dimension of an input is a number, or the name of an axis.
int64_t SizeOf(const json::Value& dimension, const Sizes& sizes) {
  if (auto number = dimension.as<int64_t>()) return *number;
  const auto name = std::string(dimension.cast<ffi::String>());
  const auto found = sizes.find(name);
  if (found == sizes.end()) throw std::runtime_error("give the size of axis `" + name + "`: " + name + "=1");
  return found->second;
}

ffi::Tensor Input(const json::Object& spec, const Sizes& sizes, const std::string& folder) {
  std::vector<int64_t> shape;
  for (const auto& dimension : spec["shape"].cast<json::Array>()) shape.push_back(SizeOf(dimension, sizes));
  const auto type = TypeOf(std::string(spec["dtype"].cast<ffi::String>()));
  auto tensor = ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(shape), type, DLDevice{kDLCPU, 0});
  const auto path = folder + "/" + std::string(spec["name"].cast<ffi::String>()) + ".raw";
  const auto bytes = Read(path);
  const auto size = ffi::GetDataSize(*tensor.GetDLTensorPtr());
  if (bytes.size() != size) {
    throw std::runtime_error("`" + path + "` has " + std::to_string(bytes.size()) + " bytes, expected " +
                             std::to_string(size));
  }
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(tensor.data_ptr()));
  return tensor;
}

void Write(const ffi::Tensor& tensor, const std::string& name, const std::string& folder) {
  std::ofstream stream(folder + "/" + name + ".raw", std::ios::binary);
  stream.write(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  if (!stream) throw std::runtime_error("can't write `" + folder + "/" + name + ".raw`");
  std::cout << name << " [";
  for (auto size : tensor.shape()) std::cout << ' ' << size;
  std::cout << " ]\n";
}

// TVM's functions are asked for by name, so that no C++ symbol of its libraries must fit this program's compiler.
ffi::Function Global(const char* name) { return ffi::Function::GetGlobalRequired(name); }

ffi::Function Member(const ffi::Module& module, const char* name) {
  auto found = Global("ffi.ModuleGetFunction")(module, ffi::String(name), false);
  return found.cast<ffi::Optional<ffi::Function>>().value();
}

// Weights lie in a file of their own where they would make the library too large.
std::vector<ffi::AnyView> Weights(const std::string& engine, std::vector<ffi::Any>* owners) {
  const auto path = engine + "/weights.params";
  if (!std::ifstream(path)) return {};
  auto found = Global("runtime.LoadParamsFromFile")(ffi::String(path)).cast<ffi::Map<ffi::String, ffi::Tensor>>();
  std::map<std::string, ffi::Tensor> sorted;
  for (const auto& [name, tensor] : found) sorted.emplace(std::string(name), tensor);
  std::vector<ffi::AnyView> views;
  owners->reserve(owners->size() + sorted.size());
  for (const auto& [name, tensor] : sorted) owners->emplace_back(tensor);
  for (const auto& owner : *owners) views.emplace_back(owner);
  return views;
}

void Run(const std::string& engine, const std::string& from, const std::string& to, const Sizes& sizes) {
  const auto signature = Global("ffi.json.Parse")(ffi::String(Read(engine + "/signature.json"))).cast<json::Object>();

  const auto library = Global("ffi.ModuleLoadFromFile")(ffi::String(engine + "/model.so")).cast<ffi::Module>();
  const auto machine = Member(library, "vm_load_executable")().cast<ffi::Module>();
  const int pooled_memory = 2;
  Member(machine, "vm_initialization")(int(kDLCPU), 0, pooled_memory);

  std::vector<ffi::Any> weights;
  const auto weight_views = Weights(engine, &weights);
  std::vector<ffi::Any> inputs;
  for (const auto& spec : signature["inputs"].cast<json::Array>()) {
    inputs.emplace_back(Input(spec.cast<json::Object>(), sizes, from));
  }
  std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
  arguments.insert(arguments.end(), weight_views.begin(), weight_views.end());
  ffi::Any found;
  Member(machine, "main").CallPacked(arguments.data(), int32_t(arguments.size()), &found);

  const auto single = found.as<ffi::Tensor>();
  size_t position = 0;
  for (const auto& spec : signature["outputs"].cast<json::Array>()) {
    const auto name = std::string(spec.cast<json::Object>()["name"].cast<ffi::String>());
    Write(single ? *single : found.cast<ffi::Array<ffi::Tensor>>()[position++], name, to);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: tvm_run ENGINE_FOLDER INPUT_FOLDER OUTPUT_FOLDER [axis=size ...]\n";
    return 2;
  }
  Sizes sizes;
  for (int position = 4; position < count; ++position) {
    std::istringstream text(arguments[position]);
    std::string name;
    std::getline(text, name, '=');
    text >> sizes[name];
  }
  try {
    Run(arguments[1], arguments[2], arguments[3], sizes);
  } catch (const std::exception& error) {
    std::cerr << "tvm_run: " << error.what() << '\n';
    return 1;
  }
}
