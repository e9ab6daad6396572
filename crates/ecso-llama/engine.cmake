# Read by CMake when it sets up llama.cpp (.cargo/config.toml says so): leaves out what no part of ecso calls.
if(PROJECT_NAME STREQUAL "llama.cpp")
    # What llama.cpp's own programs share: flags, chat parsers, downloads by HTTP. It takes minutes to compile.
    set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
    # Frames of videos, which would be read with the program ffmpeg.
    set(MTMD_VIDEO OFF CACHE BOOL "" FORCE)
    # What prepares images for the kernels of ggml takes less time to compile like this. Programs to hand out are
    # optimised fully (scripts/release sets this). The target `llama` stays: a token took 6% longer.
    function(ecso_optimise_less)
        if(TARGET mtmd)
            target_compile_options(mtmd PRIVATE -O1)
        endif()
    endfunction()
    if(NOT DEFINED ENV{ECSO_FULLY_OPTIMISED} AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        cmake_language(DEFER CALL ecso_optimise_less)
    endif()
endif()
