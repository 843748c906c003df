# libmicromix_cuda.so: csrc/cuda (quantise) and csrc/cutlass (linear). Needs nvcc, but neither a GPU
# nor a torch with CUDA. CMake's own CUDA language is not used: it wants the directories of an
# installed toolkit, which the compiler from PyPI does not have.
set(NVCC "" CACHE FILEPATH "the CUDA compiler")
set(CUTLASS_INCLUDE "" CACHE PATH "CuTe's headers, for the Blackwell instructions")
set(MICROMIX_CUDA_ARCHITECTURES "" CACHE STRING "what device code is built for; empty: every kind that there are kernels for")
if(NOT MICROMIX_CUDA_ARCHITECTURES)
  execute_process(COMMAND ${NVCC} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  foreach(architecture 80 90a 120a 121a)
    string(REGEX REPLACE "[a-z]" "" number ${architecture})
    if(known MATCHES "sm_${number}")
      list(APPEND MICROMIX_CUDA_ARCHITECTURES ${architecture})
    else()
      message(WARNING "${NVCC} knows no sm_${number}: nothing is built for it; a later CUDA does")
    endif()
  endforeach()
endif()
foreach(architecture ${MICROMIX_CUDA_ARCHITECTURES})
  if(architecture MATCHES "^12[01]f?$")
    string(REGEX REPLACE "f" "" number ${architecture})
    message(WARNING "sm_${architecture}: block-scaled instructions need sm_${number}a; products"
      " will be decoded to bfloat16 instead")
  endif()
endforeach()

get_filename_component(CUDA_ROOT ${NVCC} REALPATH)
get_filename_component(CUDA_ROOT ${CUDA_ROOT}/../.. ABSOLUTE)
unset(CUDART_STATIC CACHE)  # NVCC may be another one
find_library(CUDART_STATIC libcudart_static.a REQUIRED NO_DEFAULT_PATH
  PATHS ${CUDA_ROOT} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)

set(NVCC_FLAGS -std=c++20 -O3 --expt-relaxed-constexpr
  -Xcompiler=-fPIC,-fvisibility=hidden,-Wall)
foreach(architecture ${MICROMIX_CUDA_ARCHITECTURES})
  if(architecture MATCHES "[af]$")
    list(APPEND NVCC_FLAGS -gencode arch=compute_${architecture},code=sm_${architecture})
  else()  # with PTX: later devices without device code of their own compile that
    list(APPEND NVCC_FLAGS -gencode
      arch=compute_${architecture},code=[sm_${architecture},compute_${architecture}])
  endif()
endforeach()
if(MICROMIX_CUDA_ARCHITECTURES MATCHES "12[0-9]a")
  if(NOT CUTLASS_INCLUDE)
    message(FATAL_ERROR "sm_120a and sm_121a need CuTe's headers: pip install --no-deps nvidia-cutlass")
  endif()
  list(APPEND NVCC_FLAGS -DMICROMIX_NATIVE_ATOMS -isystem ${CUTLASS_INCLUDE})
endif()

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cutlass/*.cu)
file(GLOB CUDA_HOST_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cpp csrc/cutlass/*.cpp)
set(CUDA_OBJECTS)
foreach(source ${CUDA_SOURCES})
  file(RELATIVE_PATH name ${CMAKE_SOURCE_DIR} ${source})
  set(object ${CMAKE_BINARY_DIR}/${name}.o)
  get_filename_component(directory ${object} DIRECTORY)
  file(MAKE_DIRECTORY ${directory})
  add_custom_command(
    OUTPUT ${object} DEPFILE ${object}.d DEPENDS ${source} VERBATIM COMMENT "nvcc ${name}"
    COMMAND ${NVCC} ${NVCC_FLAGS} -ccbin ${CMAKE_CXX_COMPILER} -I${CMAKE_SOURCE_DIR}/csrc
            -MD -MF ${object}.d -c ${source} -o ${object})
  list(APPEND CUDA_OBJECTS ${object})
endforeach()

add_library(micromix_cuda MODULE ${CUDA_HOST_SOURCES} ${CUDA_OBJECTS})
set_source_files_properties(${CUDA_OBJECTS} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
list(JOIN MICROMIX_CUDA_ARCHITECTURES "," architectures)
set_property(SOURCE csrc/cuda/info.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  MICROMIX_BUILD_ID="${MICROMIX_BUILD_ID}" MICROMIX_CUDA_ARCHITECTURES="${architectures}")
target_compile_definitions(micromix_cuda PRIVATE TORCH_TARGET_VERSION=0x020b000000000000 USE_CUDA)
target_include_directories(micromix_cuda PRIVATE csrc)
target_include_directories(micromix_cuda SYSTEM PRIVATE
  ${TORCH_ROOT}/include ${TORCH_ROOT}/include/torch/csrc/api/include ${CUDA_ROOT}/include)
target_compile_options(micromix_cuda PRIVATE -Wall -Wextra)

# The stream's accessor is in libtorch_cuda.so, which a torch for the CPU lacks: an empty library of
# that name stands in for it, and the process has the real one loaded.
file(WRITE ${CMAKE_BINARY_DIR}/torch_cuda.cpp "")
add_library(torch_cuda SHARED ${CMAKE_BINARY_DIR}/torch_cuda.cpp)
target_link_libraries(micromix_cuda PRIVATE
  ${TORCH_ROOT}/lib/libtorch_cpu.so -Wl,--no-as-needed torch_cuda -Wl,--as-needed
  ${CUDART_STATIC} dl rt pthread)
set_target_properties(micromix_cuda PROPERTIES SKIP_BUILD_RPATH ON)
