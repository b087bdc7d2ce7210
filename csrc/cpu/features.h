#pragma once

#include <utility>
#include <vector>

namespace federa {

// What this processor and operating system can run, under the names of /proc/cpuinfo (and neon for ARM's asimd).
// Every name is there on every platform. AMX is what the hardware and system offer; a process must still ask for it.
std::vector<std::pair<const char*, bool>> cpu_features();

}  // namespace federa
