// Reads a release folder of exportyard in C++17, with the standard library alone: the manifest, tensors, golden vectors.
// The programs in the folders beside this one include it.

#ifndef EXPORTYARD_RELEASE_H_
#define EXPORTYARD_RELEASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace release {

inline std::string Read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("can't read `" + path + "`");
  return {std::istreambuf_iterator<char>(stream), {}};
}

// --- JSON ----------------------------------------------------------------------------------------------------------

// A value of JSON; only the member that fits its kind is filled.
struct Json {
  enum Kind { kNull, kBool, kNumber, kString, kArray, kObject } kind = kNull;
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;  // in the order of the file

  const Json* Find(const std::string& name) const {
    for (const auto& [key, value] : members) {
      if (key == name) return &value;
    }
    return nullptr;
  }
  const Json& operator[](const std::string& name) const {
    if (const Json* found = Find(name)) return *found;
    throw std::runtime_error("there is no `" + name + "`");
  }
};

class Parser {
 public:
  explicit Parser(const std::string& text) : at_(text.c_str()) {}

  Json Whole() {
    Json found = Value();
    if (Next() != '\0') Fail();
    return found;
  }

 private:
  [[noreturn]] static void Fail() { throw std::runtime_error("this is not JSON"); }

  char Next() {
    while (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r') ++at_;
    return *at_;
  }
  bool Take(char wanted) {
    if (Next() != wanted) return false;
    ++at_;
    return true;
  }
  void Need(char wanted) {
    if (!Take(wanted)) Fail();
  }

  Json Value() {
    Json found;
    if (Take('{')) {
      found.kind = Json::kObject;
      if (Take('}')) return found;
      do {
        Next();
        std::string name = String();
        Need(':');
        found.members.emplace_back(std::move(name), Value());
      } while (Take(','));
      Need('}');
    } else if (Take('[')) {
      found.kind = Json::kArray;
      if (Take(']')) return found;
      do {
        found.items.push_back(Value());
      } while (Take(','));
      Need(']');
    } else if (Next() == '"') {
      found.kind = Json::kString;
      found.text = String();
    } else {
      Word(&found);
    }
    return found;
  }

  void Word(Json* found) {
    for (const char* word : {"true", "false", "null"}) {
      if (std::strncmp(at_, word, std::strlen(word)) != 0) continue;
      at_ += std::strlen(word);
      found->kind = *word == 'n' ? Json::kNull : Json::kBool;
      found->number = *word == 't';
      return;
    }
    char* end = nullptr;
    found->kind = Json::kNumber;
    found->number = std::strtod(at_, &end);
    if (end == at_) Fail();
    at_ = end;
  }

  std::string String() {
    if (*at_ != '"') Fail();
    std::string text;
    for (++at_; *at_ != '"'; ++at_) {
      if (*at_ == '\0') Fail();
      if (*at_ != '\\') {
        text += *at_;
        continue;
      }
      switch (*++at_) {
        case 'n': text += '\n'; break;
        case 't': text += '\t'; break;
        case 'r': text += '\r'; break;
        case 'b': text += '\b'; break;
        case 'f': text += '\f'; break;
        case 'u': text += '?'; at_ += 4; break;  // in no name that we look up
        default: text += *at_;
      }
    }
    ++at_;
    return text;
  }

  const char* at_;
};

inline Json ReadJson(const std::string& path) {
  const std::string text = Read(path);
  return Parser(text).Whole();
}

// --- tensors -------------------------------------------------------------------------------------------------------

// Numbers in rows, little endian; `dtype` is numpy's name.
struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

inline size_t ItemSize(const std::string& dtype) {
  static const std::map<std::string, size_t> known = {{"float64", 8}, {"float32", 4}, {"float16", 2},
                                                      {"int64", 8},   {"int32", 4},   {"int16", 2},
                                                      {"int8", 1},    {"uint8", 1},   {"bool", 1}};
  const auto found = known.find(dtype);
  if (found == known.end()) throw std::runtime_error("unknown dtype `" + dtype + "`");
  return found->second;
}

inline size_t ByteSize(const std::string& dtype, const std::vector<int64_t>& shape) {
  size_t size = ItemSize(dtype);
  for (int64_t dimension : shape) size *= static_cast<size_t>(dimension);
  return size;
}

inline std::map<std::string, Tensor> ReadSafetensors(const std::string& path) {
  static const std::map<std::string, std::string> names = {
      {"F64", "float64"}, {"F32", "float32"}, {"F16", "float16"}, {"I64", "int64"}, {"I32", "int32"},
      {"I16", "int16"},   {"I8", "int8"},     {"U8", "uint8"},    {"BOOL", "bool"}};
  const std::string content = Read(path);
  uint64_t length = 0;
  if (content.size() < sizeof length) throw std::runtime_error("`" + path + "` is too short");
  std::memcpy(&length, content.data(), sizeof length);
  if (length > content.size() - sizeof length) throw std::runtime_error("`" + path + "` is too short");
  const size_t start = sizeof length + length;
  std::map<std::string, Tensor> found;
  const std::string header = content.substr(sizeof length, length);
  for (const auto& [name, about] : Parser(header).Whole().members) {
    if (name == "__metadata__") continue;
    Tensor& tensor = found[name];
    tensor.dtype = names.at(about["dtype"].text);
    for (const Json& size : about["shape"].items) tensor.shape.push_back(static_cast<int64_t>(size.number));
    const size_t from = static_cast<size_t>(about["data_offsets"].items.at(0).number);
    tensor.bytes = content.substr(start + from, ByteSize(tensor.dtype, tensor.shape));
    if (tensor.bytes.size() != ByteSize(tensor.dtype, tensor.shape)) {
      throw std::runtime_error("`" + path + "` is too short");
    }
  }
  return found;
}

// --- the release ---------------------------------------------------------------------------------------------------

// Inputs and outputs in the order of the signature.
struct Case {
  std::string name;
  std::vector<Tensor> inputs, outputs;
};

class Release {
 public:
  explicit Release(std::string folder) : folder_(std::move(folder)), manifest_(ReadJson(folder_ + "/manifest.json")) {}

  const Json& manifest() const { return manifest_; }

  // The engine for a target, as the manifest describes it.
  const Json& Engine(const std::string& target) const {
    const Json* found = manifest_["engines"].Find(target);
    if (found == nullptr) throw std::runtime_error("the release has no engine for `" + target + "`");
    if (found->Find("selector") != nullptr) throw std::runtime_error("`" + target + "` has buckets; see releases.md");
    return *found;
  }

  // The only target of this backend whose files are there.
  std::string Only(const std::string& backend) const {
    std::vector<std::string> found;
    for (const auto& [name, engine] : manifest_["engines"].members) {
      const bool here = std::ifstream(folder_ + "/" + engine["files"].items.at(0)["path"].text).good();
      if (engine["target"]["backend"].text == backend && here) found.push_back(name);
    }
    if (found.size() != 1) throw std::runtime_error("name a target: " + std::to_string(found.size()) + " would do");
    return found[0];
  }

  // Where the first file of an engine with one of these endings is.
  std::string File(const Json& engine, const std::vector<std::string>& endings) const {
    for (const Json& file : engine["files"].items) {
      const std::string& path = file["path"].text;
      for (const std::string& ending : endings) {
        const bool fits = path.size() > ending.size() && path.compare(path.size() - ending.size(), path.npos, ending) == 0;
        if (fits) return folder_ + "/" + path;
      }
    }
    throw std::runtime_error("the engine has no file *" + endings.at(0));
  }

  std::vector<std::string> Names(const char* which) const {
    std::vector<std::string> found;
    for (const Json& spec : manifest_["signature"][which].items) found.push_back(spec["name"].text);
    return found;
  }

  std::vector<Case> Golden() const {
    const auto tensors = ReadSafetensors(folder_ + "/" + manifest_["golden"]["file"]["path"].text);
    std::vector<Case> found;
    for (const auto& [name, sizes] : manifest_["golden"]["cases"].members) {
      Case one{name, {}, {}};
      for (const auto& input : Names("inputs")) one.inputs.push_back(tensors.at(name + "/in/" + input));
      for (const auto& output : Names("outputs")) one.outputs.push_back(tensors.at(name + "/out/" + output));
      found.push_back(std::move(one));
    }
    return found;
  }

 private:
  std::string folder_;
  Json manifest_;
};

// --- comparing -----------------------------------------------------------------------------------------------------

inline double Half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

template <typename T>
T Item(const Tensor& tensor, size_t place) {
  T item;
  std::memcpy(&item, tensor.bytes.data() + place * sizeof item, sizeof item);
  return item;
}

inline double Number(const Tensor& tensor, size_t place) {
  if (tensor.dtype == "float32") return Item<float>(tensor, place);
  if (tensor.dtype == "float64") return Item<double>(tensor, place);
  if (tensor.dtype == "float16") return Half(Item<uint16_t>(tensor, place));
  if (tensor.dtype == "int64") return static_cast<double>(Item<int64_t>(tensor, place));
  if (tensor.dtype == "int32") return Item<int32_t>(tensor, place);
  if (tensor.dtype == "int16") return Item<int16_t>(tensor, place);
  if (tensor.dtype == "int8") return Item<int8_t>(tensor, place);
  return Item<uint8_t>(tensor, place);
}

// Print how far `got` is from `want`; whether the bound holds. A NaN is too far from anything.
inline bool Compared(const std::string& name, const std::string& output, const Tensor& got, const Tensor& want,
                     const Json& bound) {
  bool good = got.dtype == want.dtype && got.shape == want.shape && got.bytes.size() == want.bytes.size();
  char words[128] = "has another type or shape than the golden one";
  if (good) {
    const size_t count = want.bytes.size() / ItemSize(want.dtype);
    double worst = 0, equal = 0;
    for (size_t place = 0; place < count; ++place) {
      const double one = Number(got, place), other = Number(want, place);
      const double gap = one == other ? 0 : std::fabs(one - other);
      equal += one == other;
      if (!(gap <= worst)) worst = std::isnan(gap) ? INFINITY : gap;
    }
    if (const Json* least = bound.Find("argmax_agreement")) {
      const double share = count ? equal / static_cast<double>(count) : 1;
      std::snprintf(words, sizeof words, "%.4f equal, at least %.4f expected", share, least->number);
      good = share >= least->number;
    } else {
      std::snprintf(words, sizeof words, "differs by %.1e, %.1e allowed", worst, bound["max_abs"].number);
      good = worst <= bound["max_abs"].number;
    }
  }
  std::printf("%-6s%-5s%s: %s\n", good ? "ok" : "WRONG", name.c_str(), output.c_str(), words);
  return good;
}

// Run all golden cases through `run`, a function from inputs to outputs; whether all bounds hold.
template <typename Function>
bool Check(const Release& release, const std::string& target, Function run) {
  const Json& engine = release.Engine(target);
  std::printf("%s v%s, %s (%s)\n", release.manifest()["recipe"].text.c_str(),
              release.manifest()["version"].text.c_str(), target.c_str(), engine["scheme"].text.c_str());
  bool good = true;
  const auto names = release.Names("outputs");
  for (const Case& one : release.Golden()) {
    const std::vector<Tensor> made = run(one.inputs);
    for (size_t place = 0; place < names.size(); ++place) {
      good &= Compared(one.name, names[place], made.at(place), one.outputs[place], engine["golden"][names[place]]);
    }
  }
  return good;
}

}  // namespace release

#endif  // EXPORTYARD_RELEASE_H_
