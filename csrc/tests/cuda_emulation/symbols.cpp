// The names of kernels and the sizes of shared variables, from the table of symbols in this library's file.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <vector>

#include "emulator.h"

namespace cuda_emulation {
namespace {

struct Symbols {
  std::map<uintptr_t, std::string> functions;  // by address, mangled
  size_t largest_static_shared = 0;
};

void read_table(const std::vector<char>& file, const Elf64_Shdr& table, const Elf64_Shdr& names, uintptr_t base,
                Symbols& result) {
  const auto* const symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + table.sh_offset);
  for (size_t i = 0; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
    const Elf64_Sym& symbol = symbols[i];
    const std::string name = file.data() + names.sh_offset + symbol.st_name;
    if (symbol.st_shndx == SHN_UNDEF) continue;
    if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) result.functions[base + symbol.st_value] = name;
    if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS && name.find("dynamic_shared") == std::string::npos) {
      result.largest_static_shared = std::max<size_t>(result.largest_static_shared, symbol.st_size);
    }
  }
}

const Symbols& symbols() {
  static const Symbols all = [] {
    Dl_info own;
    dladdr(reinterpret_cast<const void*>(&kernel_name), &own);
    std::ifstream stream(own.dli_fname, std::ios::binary);
    const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
    Symbols result;
    if (file.size() < sizeof(Elf64_Ehdr)) return result;
    const auto* const header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
    const auto* const sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      read_table(file, sections[i], sections[sections[i].sh_link], reinterpret_cast<uintptr_t>(own.dli_fbase), result);
    }
    return result;
  }();
  return all;
}

// The name and its template arguments, without the namespaces of this project, the result type and the parameters.
std::string shortened(std::string name) {
  for (const std::string noise : {"(anonymous namespace)::", "rds_fast::cuda::", "void "}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, noise.size());
  }
  return name.substr(0, name.find('('));
}

}  // namespace

std::string kernel_name(const void* kernel) {
  const auto found = symbols().functions.find(reinterpret_cast<uintptr_t>(kernel));
  if (found == symbols().functions.end()) return "a kernel";
  int status = 0;
  char* const readable = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? shortened(readable) : found->second;
  free(readable);
  return name;
}

size_t largest_static_shared() { return symbols().largest_static_shared; }

}  // namespace cuda_emulation
