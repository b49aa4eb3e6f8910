// rds_fast._build_info: what this installation was built from and for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) result.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = RDS_FAST_TORCH_VERSION;
  info["torch_abi"] = RDS_FAST_TORCH_ABI;
  info["compiler"] = RDS_FAST_COMPILER;
  info["cpu_capabilities"] = words(RDS_FAST_CPU_CAPABILITIES);
  info["cuda"] = std::string(RDS_FAST_CUDA_VERSION).empty() ? py::object(py::none()) : py::str(RDS_FAST_CUDA_VERSION);
  info["cuda_architectures"] = words(RDS_FAST_CUDA_ARCHITECTURES);
  info["commit"] = RDS_FAST_COMMIT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "What the native libraries of rds_fast were built from and for.";
  module.def("build_info", &build_info,
             "A dict: torch (the version built against), torch_abi (the oldest version that can load the libraries), "
             "compiler, cpu_capabilities (instruction sets compiled), cuda (nvcc's version, or None where the CUDA "
             "kernels were left out), cuda_architectures, commit.");
}
