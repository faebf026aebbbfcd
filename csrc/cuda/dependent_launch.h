// Whether kernels begin while the previous one still runs ("programmatic dependent launch").
#pragma once

namespace tgi::cuda {

// Allows that for all kernels after another of ours, if the device supports it; initially off.
void set_dependent_launches(bool is_on);

// Says that this thread's last kernel was a library's: its next one does not begin early.
void follow_library();

}  // namespace tgi::cuda
