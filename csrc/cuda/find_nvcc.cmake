# HNET_NVCC: an nvcc that compiles and links for CMAKE_CUDA_ARCHITECTURES, or empty. HNET_CUDA_ARCHS: those in words.
#
# CMake's own search stops the whole build where nvcc is found but does not work (no or a too new host compiler, a broken
# toolkit), so a small program is tried first.
set(HNET_NVCC "")
string(TOUPPER "${HNET_CUDA}" HNET_CUDA)
if(NOT HNET_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "HNET_CUDA must be AUTO, ON or OFF, got ${HNET_CUDA}")
endif()
if(HNET_CUDA STREQUAL "OFF")
  return()
endif()

function(hnet_no_cuda reason)
  if(HNET_CUDA STREQUAL "ON")
    message(FATAL_ERROR "hnet_kernels: HNET_CUDA=ON, but ${reason}")
  endif()
  message(STATUS "hnet_kernels: no CUDA kernels, ${reason}")
endfunction()

find_program(HNET_NVCC_FOUND nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED CMAKE_CUDA_COMPILER)
  set(nvcc ${CMAKE_CUDA_COMPILER})
elseif(DEFINED ENV{CUDACXX})
  set(nvcc $ENV{CUDACXX})
elseif(HNET_NVCC_FOUND)
  set(nvcc ${HNET_NVCC_FOUND})
else()
  hnet_no_cuda("nvcc was not found")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)  # 100 comes as PTX too, for what is newer
    execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed AND NOT known MATCHES "compute_100")
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # CUDA 12.7 and older
    endif()
  endif()
endif()

set(flags)
foreach(arch ${CMAKE_CUDA_ARCHITECTURES})
  if(arch MATCHES "^([0-9]+[a-z]?)")
    list(APPEND flags -gencode arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1})
  else()
    list(APPEND flags -arch=${arch})  # native, all, all-major
  endif()
endforeach()
set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe)
file(WRITE ${probe}.cu "#include <cooperative_groups.h>\n__global__ void k(int* x) { *x = 1; }\nvoid f(int* x) { k<<<1, 1>>>(x); }\n")
execute_process(
  COMMAND ${nvcc} -std=c++17 -Xcompiler=-fPIC -shared -cudart static ${flags} ${probe}.cu -o ${probe}.so
  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  string(REGEX MATCH "[^\n]+" said "${said}")
  hnet_no_cuda("${nvcc} does not work (${failed}): ${said}")
  return()
endif()

set(HNET_NVCC ${nvcc})
string(REGEX REPLACE "-(real|virtual)" "" HNET_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "([^;]+)" "sm_\\1" HNET_CUDA_ARCHS "${HNET_CUDA_ARCHS}")
string(REPLACE ";" ", " HNET_CUDA_ARCHS "${HNET_CUDA_ARCHS}")
message(STATUS "hnet_kernels: CUDA kernels for ${HNET_CUDA_ARCHS} (${nvcc})")
