// Runs an engine of exportyard's backend `tvm`, without Python:
//
//   tvm_run RELEASE_FOLDER TARGET
//   tvm_run ENGINE_FOLDER INPUT_FOLDER OUTPUT_FOLDER [axis=size ...]
//
// The first form checks the engine on the release's golden vectors, and ends with 0 if all is well, or 1. The second runs
// it once: it reads INPUT_FOLDER/<input>.raw and writes OUTPUT_FOLDER/<output>.raw, the numbers alone, little endian, in
// rows. Names, types and shapes come from signature.json in the engine's folder; a shape's axes get the sizes that are
// given. Anything that is missing ends with 2.

#include <iostream>
#include <sstream>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include "../release.h"

namespace ffi = tvm::ffi;

namespace {

using release::Json;
using release::Tensor;
using Sizes = std::map<std::string, int64_t>;

// Memory for a tensor, aligned as TVM's code expects it.
struct Memory {
  void AllocData(DLTensor* tensor) {
    if (posix_memalign(&tensor->data, 64, ffi::GetDataSize(*tensor) + 1) != 0) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

const std::map<std::string, DLDataType>& Types() {
  static const std::map<std::string, DLDataType> known = {
      {"float32", {kDLFloat, 32, 1}}, {"float64", {kDLFloat, 64, 1}}, {"float16", {kDLFloat, 16, 1}},
      {"int64", {kDLInt, 64, 1}},     {"int32", {kDLInt, 32, 1}},     {"int16", {kDLInt, 16, 1}},
      {"int8", {kDLInt, 8, 1}},       {"uint8", {kDLUInt, 8, 1}},     {"bool", {kDLBool, 8, 1}}};
  return known;
}

ffi::Tensor ToTvm(const Tensor& tensor) {
  auto found = ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(tensor.shape), Types().at(tensor.dtype),
                                        DLDevice{kDLCPU, 0});
  std::copy(tensor.bytes.begin(), tensor.bytes.end(), static_cast<char*>(found.data_ptr()));
  return found;
}

Tensor FromTvm(const ffi::Tensor& tensor) {
  Tensor found;
  const DLDataType type = tensor.dtype();
  for (const auto& [name, known] : Types()) {
    if (known.code == type.code && known.bits == type.bits) found.dtype = name;
  }
  for (auto size : tensor.shape()) found.shape.push_back(size);
  found.bytes.assign(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  return found;
}

// TVM's functions are asked for by name, so that no C++ symbol of its libraries must fit this program's compiler.
ffi::Function Global(const char* name) { return ffi::Function::GetGlobalRequired(name); }

ffi::Function Member(const ffi::Module& module, const char* name) {
  auto found = Global("ffi.ModuleGetFunction")(module, ffi::String(name), false);
  return found.cast<ffi::Optional<ffi::Function>>().value();
}

// Weights lie in a file of their own where they would make the library too large.
std::vector<ffi::Any> Weights(const std::string& folder) {
  const auto path = folder + "/weights.params";
  if (!std::ifstream(path)) return {};
  auto found = Global("runtime.LoadParamsFromFile")(ffi::String(path)).cast<ffi::Map<ffi::String, ffi::Tensor>>();
  std::map<std::string, ffi::Tensor> sorted;  // the order of the arguments
  for (const auto& [name, tensor] : found) sorted.emplace(std::string(name), tensor);
  std::vector<ffi::Any> weights;
  for (const auto& [name, tensor] : sorted) weights.emplace_back(tensor);
  return weights;
}

// One engine, loaded. Inputs and outputs are in the order of its signature.
class Engine {
 public:
  explicit Engine(const std::string& folder) {
    const auto library = Global("ffi.ModuleLoadFromFile")(ffi::String(folder + "/model.so")).cast<ffi::Module>();
    const auto machine = Member(library, "vm_load_executable")().cast<ffi::Module>();
    const int pooled_memory = 2;
    Member(machine, "vm_initialization")(int(kDLCPU), 0, pooled_memory);
    main_ = Member(machine, "main");
    weights_ = Weights(folder);
  }

  std::vector<Tensor> Run(const std::vector<Tensor>& feeds) const {
    std::vector<ffi::Any> owners;
    for (const Tensor& feed : feeds) owners.emplace_back(ToTvm(feed));
    std::vector<ffi::AnyView> arguments(owners.begin(), owners.end());
    arguments.insert(arguments.end(), weights_.begin(), weights_.end());
    ffi::Any made;
    main_.CallPacked(arguments.data(), int32_t(arguments.size()), &made);
    if (const auto single = made.as<ffi::Tensor>()) return {FromTvm(*single)};
    std::vector<Tensor> found;
    for (const auto& tensor : made.cast<ffi::Array<ffi::Tensor>>()) found.push_back(FromTvm(tensor));
    return found;
  }

 private:
  ffi::Function main_;
  std::vector<ffi::Any> weights_;
};

// A dimension of an input is a number, or the name of an axis.
int64_t SizeOf(const Json& dimension, const Sizes& sizes) {
  if (dimension.kind == Json::kNumber) return static_cast<int64_t>(dimension.number);
  const auto found = sizes.find(dimension.text);
  if (found == sizes.end()) {
    throw std::runtime_error("give the size of axis `" + dimension.text + "`: " + dimension.text + "=1");
  }
  return found->second;
}

Tensor ReadRaw(const Json& spec, const Sizes& sizes, const std::string& folder) {
  Tensor found;
  found.dtype = spec["dtype"].text;
  for (const Json& dimension : spec["shape"].items) found.shape.push_back(SizeOf(dimension, sizes));
  const auto path = folder + "/" + spec["name"].text + ".raw";
  const auto size = release::ByteSize(found.dtype, found.shape);
  found.bytes = release::Read(path);
  if (found.bytes.size() != size) {
    throw std::runtime_error("`" + path + "` has " + std::to_string(found.bytes.size()) + " bytes, expected " +
                             std::to_string(size));
  }
  return found;
}

void WriteRaw(const Tensor& tensor, const std::string& name, const std::string& folder) {
  std::ofstream stream(folder + "/" + name + ".raw", std::ios::binary);
  stream.write(tensor.bytes.data(), static_cast<std::streamsize>(tensor.bytes.size()));
  if (!stream) throw std::runtime_error("can't write `" + folder + "/" + name + ".raw`");
  std::cout << name << " [";
  for (auto size : tensor.shape) std::cout << ' ' << size;
  std::cout << " ]\n";
}

void RunOnce(const std::string& folder, const std::string& from, const std::string& to, const Sizes& sizes) {
  const Json signature = release::ReadJson(folder + "/signature.json");
  const Engine engine(folder);
  std::vector<Tensor> inputs;
  for (const Json& spec : signature["inputs"].items) inputs.push_back(ReadRaw(spec, sizes, from));
  const auto made = engine.Run(inputs);
  const auto& outputs = signature["outputs"].items;
  for (size_t place = 0; place < outputs.size(); ++place) WriteRaw(made.at(place), outputs[place]["name"].text, to);
}

bool CheckGolden(const std::string& folder, const std::string& target) {
  const release::Release found(folder);
  const std::string library = found.File(found.Engine(target), {"/model.so"});
  const Engine engine(library.substr(0, library.rfind('/')));
  return release::Check(found, target, [&](const std::vector<Tensor>& feeds) { return engine.Run(feeds); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: tvm_run RELEASE_FOLDER TARGET\n"
                 "       tvm_run ENGINE_FOLDER INPUT_FOLDER OUTPUT_FOLDER [axis=size ...]\n";
    return 2;
  }
  try {
    if (count == 3) return CheckGolden(arguments[1], arguments[2]) ? 0 : 1;
    Sizes sizes;
    for (int position = 4; position < count; ++position) {
      std::istringstream text(arguments[position]);
      std::string name;
      std::getline(text, name, '=');
      text >> sizes[name];
    }
    RunOnce(arguments[1], arguments[2], arguments[3], sizes);
  } catch (const std::exception& error) {
    std::cerr << "tvm_run: " << error.what() << '\n';
    return 2;
  }
  return 0;
}
