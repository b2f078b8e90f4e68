// Interface to the memory of large outputs. C ABI on raw pointers: nothing here knows about torch.
#pragma once

#include <cstdint>

extern "C" {

// Asks the system for the pages of `bytes` bytes that are about to be written, from at most `threads` threads: all at
// once in place of one fault for each, which is most of what a first write to hundreds of megabytes costs. What the
// memory holds stays as it is. Does nothing where the pages are there, and on systems that cannot (Linux before 5.14).
void asyncopd_cpu_populate(void* memory, int64_t bytes, int threads);
}
