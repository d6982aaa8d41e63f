// Runs an ONNX engine of a release with ONNX Runtime's C interface, and checks it on the release's golden vectors:
//
//   ort_run RELEASE_FOLDER [TARGET]
//
// The library is loaded when the program starts: `libonnxruntime.so.1`, or what the variable ONNXRUNTIME names.
// Exit code: 0 all is well, 1 an output is too far from the golden one, 2 something is missing.

#include <dlfcn.h>

#include <iostream>
#include <memory>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_api.h"
#endif

#include "../release.h"

namespace {

using release::Tensor;

const OrtApi* ort = nullptr;

void Good(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + message);
}

// An object of the library, which goes with its owner.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

template <typename T, typename Maker, typename... Arguments>
Owned<T> Made(void (*release)(T*), Maker make, Arguments... arguments) {
  T* found = nullptr;
  Good(make(arguments..., &found));
  return Owned<T>(found, release);
}

void Load() {
  const char* named = std::getenv("ONNXRUNTIME");
  void* library = dlopen(named && *named ? named : "libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string(dlerror()) + " (ONNXRUNTIME=... names the library)");
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) throw std::runtime_error(dlerror());
  ort = base()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) throw std::runtime_error(std::string("ONNX Runtime is too old: ") + base()->GetVersionString());
}

const std::map<std::string, ONNXTensorElementDataType>& Types() {
  static const std::map<std::string, ONNXTensorElementDataType> known = {
      {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},  {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
      {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
      {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},
      {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},      {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
      {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};
  return known;
}

Tensor Copied(OrtValue* value) {
  const auto info = Made<OrtTensorTypeAndShapeInfo>(ort->ReleaseTensorTypeAndShapeInfo, ort->GetTensorTypeAndShape, value);
  Tensor found;
  ONNXTensorElementDataType type;
  Good(ort->GetTensorElementType(info.get(), &type));
  for (const auto& [name, known] : Types()) {
    if (known == type) found.dtype = name;
  }
  size_t rank = 0;
  Good(ort->GetDimensionsCount(info.get(), &rank));
  found.shape.resize(rank);
  Good(ort->GetDimensions(info.get(), found.shape.data(), rank));
  void* data = nullptr;
  Good(ort->GetTensorMutableData(value, &data));
  found.bytes.assign(static_cast<const char*>(data), release::ByteSize(found.dtype, found.shape));
  return found;
}

// A graph that is laid out for its CPU already; another one gets its layout as it is loaded.
bool IsFinished(const release::Json& engine) {
  const release::Json* level = engine["target"]["options"].Find("optimization");
  return level != nullptr && level->text == "all";
}

// One engine, loaded. Inputs and outputs are in the order of the release's signature.
class Engine {
 public:
  Engine(const std::string& path, bool finished, std::vector<std::string> inputs, std::vector<std::string> outputs)
      : inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        env_(Made<OrtEnv>(ort->ReleaseEnv, ort->CreateEnv, ORT_LOGGING_LEVEL_WARNING, "ort_run")),
        memory_(Made<OrtMemoryInfo>(ort->ReleaseMemoryInfo, ort->CreateCpuMemoryInfo, OrtArenaAllocator,
                                    OrtMemTypeDefault)),
        session_(nullptr, ort->ReleaseSession) {
    const auto options = Made<OrtSessionOptions>(ort->ReleaseSessionOptions, ort->CreateSessionOptions);
    if (finished) Good(ort->SetSessionGraphOptimizationLevel(options.get(), ORT_DISABLE_ALL));
    session_ = Made<OrtSession>(ort->ReleaseSession, ort->CreateSession, static_cast<const OrtEnv*>(env_.get()),
                                path.c_str(), static_cast<const OrtSessionOptions*>(options.get()));
  }

  std::vector<Tensor> Run(const std::vector<Tensor>& feeds) const {
    std::vector<Owned<OrtValue>> values;
    std::vector<const OrtValue*> given;
    for (const Tensor& feed : feeds) {
      // the library only reads it
      void* data = const_cast<char*>(feed.bytes.data());
      values.push_back(Made<OrtValue>(ort->ReleaseValue, ort->CreateTensorWithDataAsOrtValue,
                                      static_cast<const OrtMemoryInfo*>(memory_.get()), data, feed.bytes.size(),
                                      feed.shape.data(), feed.shape.size(), Types().at(feed.dtype)));
      given.push_back(values.back().get());
    }
    const auto input_names = Words(inputs_), output_names = Words(outputs_);
    std::vector<OrtValue*> made(outputs_.size(), nullptr);
    Good(ort->Run(session_.get(), nullptr, input_names.data(), given.data(), given.size(), output_names.data(),
                  made.size(), made.data()));
    std::vector<Tensor> found;
    for (OrtValue* value : made) {
      found.push_back(Copied(value));
      ort->ReleaseValue(value);
    }
    return found;
  }

 private:
  static std::vector<const char*> Words(const std::vector<std::string>& names) {
    std::vector<const char*> found;
    for (const auto& name : names) found.push_back(name.c_str());
    return found;
  }

  std::vector<std::string> inputs_, outputs_;
  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
};

}  // namespace

int main(int count, char** words) {
  if (count < 2) {
    std::cerr << "usage: ort_run RELEASE_FOLDER [TARGET]\n";
    return 2;
  }
  try {
    Load();
    const release::Release found(words[1]);
    const std::string target = count > 2 ? words[2] : found.Only("onnxruntime");
    const release::Json& about = found.Engine(target);
    const Engine engine(found.File(about, {".onnx", ".ort"}), IsFinished(about), found.Names("inputs"),
                        found.Names("outputs"));
    return release::Check(found, target, [&](const std::vector<Tensor>& feeds) { return engine.Run(feeds); }) ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "ort_run: " << error.what() << '\n';
    return 2;
  }
}
