// A step that a device can be asked for without Python. The extension for CUDA, which is compiled
// apart from the CPU's, passes the address of this struct to it.
#pragma once

namespace tgi {

// Each call returns null, or why it failed: text that the caller frees with `std::free`.
struct DeviceCalls {
  void* self;
  char* (*submit)(void* self);  // asks for the step; does not wait
  char* (*wait)(void* self);    // waits until the device has done it
};

}  // namespace tgi
