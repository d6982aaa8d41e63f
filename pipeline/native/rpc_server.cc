// A TVM RPC server without Python, for one client at a time.
//
//   rpc_server [PORT [ADDRESS]]    listens on 127.0.0.1 unless told otherwise, and prints its port
//   rpc_server PORT ADDRESS follow ends when its standard input does: with the process that started it
//
// It needs libtvm_ffi.so and libtvm_runtime.so, runs engines of another machine under an emulator, and may run on a
// board. Whoever reaches its port may load code into it, so leave it on a network that you trust.

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

namespace ffi = tvm::ffi;

namespace {

constexpr int32_t kMagic = 0xff271;  // of TVM's data connections; as an answer: welcome
constexpr int32_t kLongestKey = 4096;

void Check(bool fine, const char* what) {
  if (!fine) {
    std::perror(what);
    std::exit(1);
  }
}

bool Receive(int peer, void* data, size_t size) { return recv(peer, data, size, MSG_WAITALL) == ssize_t(size); }

bool Send(int peer, const void* data, size_t size) { return send(peer, data, size, MSG_NOSIGNAL) == ssize_t(size); }

// The client says which kind of device it wants; everyone who speaks the protocol is welcome.
bool Greet(int peer) {
  int32_t magic = 0, length = 0;
  if (!Receive(peer, &magic, 4) || magic != kMagic || !Receive(peer, &length, 4)) return false;
  if (length < 0 || length > kLongestKey) return false;
  std::string key(length, '\0');
  const std::string own = "server:";
  const int32_t own_length = int32_t(own.size());
  return Receive(peer, key.data(), key.size()) && Send(peer, &kMagic, 4) && Send(peer, &own_length, 4) &&
         Send(peer, own.data(), own.size());
}

int Listen(uint16_t port, const char* where) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  Check(listener >= 0, "socket");
  const int yes = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  if (inet_pton(AF_INET, where, &address.sin_addr) != 1) {
    std::fprintf(stderr, "`%s` is not an IPv4 address\n", where);
    std::exit(2);
  }
  socklen_t size = sizeof address;
  Check(bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0, "bind");
  Check(listen(listener, 1) == 0, "listen");
  Check(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0, "getsockname");
  std::printf("%d\n", int(ntohs(address.sin_port)));
  std::fflush(stdout);
  return listener;
}

// What the runtime asks of a server's environment: where uploaded files go, and how a library is opened.
void Register(const std::string& folder) {
  auto place = [folder](const std::string& name) { return name.rfind('/', 0) == 0 ? name : folder + "/" + name; };
  auto load = ffi::Function::GetGlobalRequired("ffi.ModuleLoadFromFile");
  ffi::Function::SetGlobal("tvm.rpc.server.workpath", ffi::Function::FromTyped([place](ffi::String name) {
                             return ffi::String(place(std::string(name)));
                           }), true);
  ffi::Function::SetGlobal("tvm.rpc.server.load_module", ffi::Function::FromTyped([place, load](ffi::String name) {
                             return load(ffi::String(place(std::string(name)))).cast<ffi::Module>();
                           }), true);
}

}  // namespace

int main(int count, char** arguments) {
  char folder[] = "/tmp/tvm-rpc-XXXXXX";
  Check(mkdtemp(folder) != nullptr, "mkdtemp");
  Register(folder);
  const int listener =
      Listen(count > 1 ? uint16_t(std::atoi(arguments[1])) : 0, count > 2 ? arguments[2] : "127.0.0.1");
  if (count > 3) {
    std::thread([&folder] {
      while (std::getchar() != EOF) {
      }
      rmdir(folder);
      _exit(0);
    }).detach();
  }
  auto serve = ffi::Function::GetGlobalRequired("rpc.ServerLoop");
  for (;;) {
    const int peer = accept(listener, nullptr, nullptr);
    Check(peer >= 0, "accept");
    if (Greet(peer)) {
      serve(peer);
    } else {
      close(peer);
    }
  }
}
