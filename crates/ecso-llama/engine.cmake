# Read by CMake when it sets up llama.cpp (.cargo/config.toml says so): leaves out what no part of ecso calls.
if(PROJECT_NAME STREQUAL "llama.cpp")
    # What llama.cpp's own programs share: flags, chat parsers, downloads by HTTP. It takes minutes to compile.
    set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
    # Frames of videos, which would be read with the program ffmpeg.
    set(MTMD_VIDEO OFF CACHE BOOL "" FORCE)
    # All of its time goes into the kernels of ggml. To optimise the rest fully takes minutes more, which only programs to
    # hand out are worth (scripts/release sets this).
    function(ecso_optimise_less)
        foreach(target llama mtmd)
            if(TARGET ${target})
                target_compile_options(${target} PRIVATE -O1)
            endif()
        endforeach()
    endfunction()
    if(NOT DEFINED ENV{ECSO_FULLY_OPTIMISED} AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        cmake_language(DEFER CALL ecso_optimise_less)
    endif()
endif()
