// Descriptions for errors: threads, source lines, memory
#include <dlfcn.h>

#include <cstdio>

#include "runtime.h"

namespace cuda_host {
namespace {

// Files are compiled as ./path/from/the/root.
std::string without_dots(std::string path) {
  while (path.rfind("./", 0) == 0) path.erase(0, 2);
  return path;
}

// Output of addr2line for an address: function and file:line, from the innermost inlined function outwards.
std::vector<std::string> lines_of(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info)) return {};
  char command[4096];
  snprintf(command, sizeof(command), "addr2line -C -f -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           size_t(uintptr_t(address) - uintptr_t(info.dli_fbase)));
  std::vector<std::string> lines;
  if (FILE* output = popen(command, "r")) {
    char line[4096];
    while (fgets(line, sizeof(line), output)) {
      line[strcspn(line, "\n")] = 0;
      lines.push_back(line);
    }
    pclose(output);
  }
  return lines;
}

}  // namespace

std::vector<Region> tensors;

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string describe(Site site) { return without_dots(site.file) + ":" + std::to_string(site.line); }

std::string describe_code(const void* address) {
  const std::vector<std::string> lines = lines_of(address);
  std::string text;
  for (size_t i = 1; i < lines.size(); i += 2) {
    const std::string line = without_dots(lines[i].substr(0, lines[i].find(" (discriminator")));
    // Stop at the kernel
    if (line.find("cuda_host/include") != std::string::npos && !text.empty()) break;
    text += (text.empty() ? "" : ", inlined at ") + line;
  }
  return text.empty() ? "unknown line" : text;
}

std::string kernel_name() {
  const std::vector<std::string> lines = lines_of(launched.call.kernel);
  if (lines.size() < 2) return "kernel";
  std::string name = lines[lines.size() - 2];
  for (const std::string noise : {"(anonymous namespace)::", "void "}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  }
  // Cut before the parameters, which start at a parenthesis outside template arguments.
  size_t end = 0;
  for (int depth = 0; end < name.size() && (depth || name[end] != '('); ++end) {
    depth += (name[end] == '<') - (name[end] == '>');
  }
  return name.substr(0, end);
}

std::string describe_data(uintptr_t address) {
  const Region* nearest = nullptr;
  long long distance = 0;
  const auto consider = [&](const Region& region) {
    const long long past = (long long)(address - (region.begin + region.bytes));
    const long long before = (long long)(region.begin - address);
    const long long here = past >= 0 ? past : before > 0 ? -before : 0;
    if (nearest && llabs(here) >= llabs(distance)) return;
    nearest = &region;
    distance = here;
  };
  for (const Region& tensor : tensors) consider(tensor);
  for (const Region* region : {&dynamic_region, &static_shared}) consider(*region);
  char text[64];
  if (!nearest || llabs(distance) > (1 << 20)) {
    snprintf(text, sizeof(text), "address 0x%zx", size_t(address));
    return text;
  }
  const bool inside = address - nearest->begin < nearest->bytes;
  if (inside) return "byte " + std::to_string(address - nearest->begin) + " of " + nearest->name;
  if (distance < 0) return std::to_string(-distance) + " bytes before " + nearest->name;
  return (distance ? std::to_string(distance) + " bytes" : "just") + " past the end of " + nearest->name;
}

}  // namespace cuda_host
